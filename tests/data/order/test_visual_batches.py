"""The order and the drawn factor of visuals: epochs by counting, draws by any rank, how even they are."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare
from visual_stores import TOWER, make_store

from ropewalk.data import Mixture
from ropewalk.data.order.batches import VisualKey, rank_micro_batches, read_batch, rows_of
from ropewalk.data.order.visual_batches import TowerGeometry, VisualReader, temporal_scale
from ropewalk.data.store.visuals import Visual, read_visual, visual_row
from ropewalk.rope.pair_axes import PairAxes
from ropewalk.rope.video_positions import Grid, token_positions

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)
GEOMETRY = TowerGeometry(TOWER["patch_size"], TOWER["temporal_patch_size"], TOWER["spatial_merge_size"], 64)
READER = VisualReader(PairAxes("alternating", (4, 6, 6), "diagonal", SCALES), 0, GEOMETRY, (508, 509), None, True)


@pytest.fixture(scope="module")
def store(tmp_path_factory, fixture_tokenizer):
    return make_store(tmp_path_factory.mktemp("visuals") / "store", fixture_tokenizer)


def test_an_epoch_is_how_often_a_row_has_come_before(store):
    mixture, seen = Mixture(3, {}, store, 5), Counter()
    for step in range(10):  # 50 sequences of 12
        for ref in mixture.global_batch(step):
            for domain, row, epoch in rows_of(ref):
                assert epoch == seen[domain, row]
                seen[domain, row] += 1
    assert max(seen.values()) == 5


def test_every_number_of_ranks_draws_the_same(store):
    """Time between the first two frames of each video, read off the positions, is the factor of the record."""
    mixture = Mixture(0, {}, store, 8)
    recorded = {tuple(key): scale for *key, scale in READER.drawn(mixture, 1)}
    assert {epoch for *_, epoch in recorded} == {0, 1}  # sequences 8 .. 15 of 12
    for world_size, micro in ((1, 8), (2, 1), (4, 2)):
        seen = {}
        for rank in range(world_size):
            for part in rank_micro_batches(mixture, 1, rank, world_size, micro):
                batch = READER.completed(read_batch(mixture.store, part))
                time = batch.vision.positions[0, 0]
                for visual, key in zip(batch.visuals, batch.visual_keys, strict=True):
                    rows = visual.height * visual.width
                    seen[tuple(key)] = (
                        recorded[key] if visual.frames == 1 else float(time[visual.start + rows] - time[visual.start])
                    )
        assert seen == recorded


@pytest.mark.parametrize("fps", [3, 6, 7, 24, 25, 30])
@pytest.mark.parametrize("speed", [2, 4, 25])
def test_a_stored_time_gives_the_positions_of_the_exact_one(fps, speed):
    """2/fps seconds are kept to the microsecond; 128 frames at whole positions a second, divided without remainder."""
    visual = Visual(0, 128, 1, 1, np.zeros((128, 1), np.uint16), 2 / fps)
    stored = read_visual(np.array(visual_row(visual, 0)), visual.content.view(np.uint8).ravel())
    reader = replace(READER, axes=PairAxes("bands", (4, 6, 6), "mrope"), tokens_per_second=float(speed))
    step = reader.time_step(stored, VisualKey("visuals", 0, 0, 0))
    time = token_positions("mrope", [Grid(128, 1, 1, step)])[0][0]
    assert time.tolist() == [2 * speed * frame // fps for frame in range(128)]


def test_factors_are_even_and_of_seed_visual_and_epoch_alone():
    keys = [VisualKey("a", row, number, epoch) for row in range(500) for number in range(2) for epoch in range(2)]
    draws = [temporal_scale(SCALES, 0, key) for key in keys]
    assert chisquare(list(Counter(draws).values())).pvalue > 0.01
    assert draws == [temporal_scale(SCALES, 0, key) for key in keys]
    for field, other in (("domain", "b"), ("row", 501), ("number", 2), ("epoch", 2)):
        moved = [temporal_scale(SCALES, 0, key._replace(**{field: other})) for key in keys]
        assert 0.1 < np.mean(np.equal(draws, moved)) < 0.3  # a fifth by chance
    assert 0.1 < np.mean(np.equal(draws, [temporal_scale(SCALES, 1, key) for key in keys])) < 0.3
