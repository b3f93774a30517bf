"""V-NIAH (arXiv 2406.16852; HoPE, arXiv 2505.20444) as a harness (``suite=vniah``): frames x depth x factor.

Haystack and needles are one file (data_prep/prepare_video.py vniah), so every arm sees the same frames. Their pixels go
through a model's tower once. A tower attends inside its frames, so frames may then be put together in any order. The
cells are (question, tokens of the frames, factor).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ropewalk.config.evaluation import EvaluateConfig, SuiteConfig, VniahConfig
from ropewalk.config.groups import TestTimeConfig
from ropewalk.data.order.batches import collate
from ropewalk.data.order.visual_batches import VisualReader
from ropewalk.data.prepare.tokenizer import DocumentEncoder
from ropewalk.data.prepare.video.frames import Example, Footage
from ropewalk.data.prepare.video.haystack import (
    FILE,
    Haystack,
    needle_place,
    quarter_of,
    read_haystack,
    write_haystack,
)
from ropewalk.data.prepare.video.visual_pipeline import VisualEncoder
from ropewalk.data.store.reader import PackedSequence
from ropewalk.errors import UserError
from ropewalk.evaluation.evaluated_checkpoint import EvaluatedCheckpoint, settings_by_length
from ropewalk.evaluation.harness.held_out import in_order
from ropewalk.evaluation.harness.needle_retrieval import graded, needle_rows
from ropewalk.evaluation.model_reader import ModelReader, Progress
from ropewalk.evaluation.results import ESTIMATE, VIDEO_HARNESS, as_shares, is_loss
from ropewalk.evaluation.results_store import Cell, ResultsStore
from ropewalk.files import sha256_of, writing
from ropewalk.model.hf_directory import read_config
from ropewalk.model.vision import pixel_values, placeholders, tokens_per_second, tower_geometry, tower_of
from ropewalk.rope.pair_axes import PairAxes
from ropewalk.training.distributed import Ranks, gather, rank_zero_first

QUESTIONS = ("content", "when")
TASK = "vniah_{}"  # of a question; the whole of a length has "_at_length" behind it
AT_ONCE = 64  # frames that go through a tower together


def validate_vniah(config: EvaluateConfig) -> None:
    """Check the settings of suite=vniah by themselves, without the checkpoint and the haystack.

    Raises:
        UserError: naming the value, the rule and the fix.
    """
    vniah = config.vniah
    if vniah.data is None:
        raise UserError(
            "vniah.data is not set, and suite=vniah reads a haystack; name the directory that "
            "data_prep/prepare_video.py vniah wrote"
        )
    if config.backend != "transformers":
        raise UserError(f"backend={config.backend} cannot be given embeddings, and suite=vniah does; set transformers")
    for name in ("frames", "depths", "questions", "factors"):
        values = getattr(vniah, name)
        if (not values and name != "factors") or len(set(values)) != len(values):
            raise UserError(f"vniah.{name}={values} must name one or more, each once")
    if unknown := set(vniah.questions) - set(QUESTIONS):
        raise UserError(f"vniah.questions={vniah.questions}: {min(unknown)} is not known; use {' or '.join(QUESTIONS)}")
    if len(vniah.depths) * vniah.samples < 2:
        raise UserError(
            "vniah.samples=1 at one depth: the shuffled-answer control needs two prompts of a length; set "
            "vniah.samples=2 or more"
        )
    if vniah.distractors >= min(vniah.frames):
        raise UserError(
            f"vniah.distractors={vniah.distractors} leave no frame of {min(vniah.frames)} for the needle; set fewer"
        )


@dataclass(frozen=True)
class _Variant:
    """Positions that a frame takes, and the name of the setting in the report.

    Attributes:
        axes: of the checkpoint, with that one temporal scale.
        added: to the printed test-time scaling; "": the chain's own scale.
    """

    axes: PairAxes
    added: str

    def scaling(self, of_test_time: str) -> str:
        """The column test_time_scaling."""
        parts = [part for part in (self.added, of_test_time) if part and part != "none"]
        return " > ".join(parts) or "none"

    def name(self, test_time: str) -> str:
        """The column test_time."""
        return " ".join([part for part in (test_time, self.added) if part and (part != "none" or not self.added)])


def variants_of(axes: PairAxes, factors: list[float]) -> list[_Variant]:
    """The factors that a model is measured under: those given, else its own, of several the middle one.

    Raises:
        UserError: for factors under a rule for positions that has none.
    """
    scales = sorted(axes.temporal_scales)
    own = scales[len(scales) // 2]
    if factors and axes.positions != "diagonal":
        raise UserError(
            f"vniah.factors={factors} have no meaning under positions={axes.positions}, where each frame takes a whole "
            "position; leave them out for this checkpoint"
        )
    return [
        _Variant(
            replace(axes, temporal_scales=(factor,)), "" if factor == own else f"temporal_scale(factor={factor:g})"
        )
        for factor in factors or [own]
    ]


def run_vniah(
    checkpoint: EvaluatedCheckpoint, suite: SuiteConfig, test_time: TestTimeConfig, store: ResultsStore, ranks: Ranks
) -> None:
    """Measure the cells that are not finished, one model in memory at a time.

    Raises:
        UserError: for a haystack or a factor that does not fit the model, before it is loaded.
    """
    config = checkpoint.config
    vniah = replace(config.vniah, samples=suite.samples or config.vniah.samples)
    path = Path(str(vniah.data)) / FILE
    haystack, _ = read_haystack(path)
    check_haystack(checkpoint, haystack, vniah)
    axes = checkpoint.position.axes
    assert axes is not None  # every model of images and videos has them
    variants = variants_of(axes, vniah.factors)
    frames_at = {frames * haystack.tokens_per_frame: frames for frames in sorted(vniah.frames)}
    measured = {name: getattr(vniah, name) for name in ("depths", "samples", "distractors")}
    shared = {"harness_version": version("ropewalk"), "haystack": sha256_of(path), "vniah": measured}
    todo = []
    for setting in settings_by_length(checkpoint.position, config.rope, test_time, list(frames_at)):
        columns = checkpoint.columns(setting)
        for variant in variants:
            scaling = variant.scaling(columns["test_time_scaling"])
            if ranks.rank == 0:
                named = variant.name(test_time.name)
                store.record_test_time(named, dict.fromkeys(setting.lengths, scaling), [])
            for length in setting.lengths:
                identity = checkpoint.identity(setting, length) | shared | {"factor": variant.axes.temporal_scales[0]}
                cells = [Cell(VIDEO_HARNESS, TASK.format(question), length, scaling) for question in vniah.questions]
                todo += [(setting, variant, cell, identity) for cell in cells if not store.is_finished(cell, identity)]
    if not todo:
        print(f"{store.output} holds this V-NIAH already", flush=True)
        return
    progress = Progress("evaluate", sum(int(cell.length or 0) for _, _, cell, _ in todo))
    loaded, model, prompts = None, None, None
    for setting, variant, cell, identity in todo:
        if setting is not loaded:
            del model
            loaded, model = setting, checkpoint.load(setting, setting.longest, ranks.local_device(config.device))
            embed = partial(embedded, model, haystack, path, vniah.embeddings)
            haystack = embed() if vniah.embeddings is None else rank_zero_first(embed)  # which writes it for the others
            prompts = Prompts(checkpoint, haystack, vniah)
        assert prompts is not None
        length = int(cell.length or 0)
        reader = ModelReader(model, config.prefill_chunk)
        scores = _scores(
            reader, prompts, variant.axes, cell.task.removeprefix(TASK.format("")), frames_at[length], ranks
        )
        if ranks.rank == 0:
            own = {"test_time_scaling": cell.scaling, "frames": frames_at[length]}
            rows = [
                _table_row(row, {**checkpoint.columns(setting), **own})
                for row in needle_rows(scores, config.seed, cell.task)
            ]
            store.write(cell, identity, rows, {"needles": len(haystack.needles)}, scores.to_dict("records"))
        progress.advance(length, f"{cell}")


def check_haystack(checkpoint: EvaluatedCheckpoint, haystack: Haystack, vniah: VniahConfig) -> None:
    """Check a haystack against the tower of a checkpoint, and the questions and distractors that it is asked for.

    Raises:
        UserError: naming what is there and what is needed.
    """
    tower = tower_geometry(read_config(checkpoint.directory, key="checkpoint"))
    rows, columns = haystack.grid
    wanted: tuple[int, ...] = (rows * columns, tower.width)
    if haystack.has_pixels:
        wanted = (tower.temporal_patch_size, rows * tower.pixels, columns * tower.pixels, 3)
    if haystack.frames.shape[1:] != wanted:
        raise UserError(
            f"vniah.data={vniah.data} holds frames of {haystack.frames.shape[1:]} and the tower of "
            f"{checkpoint.config.checkpoint} takes {wanted}; prepare it with this model's sizes (tower.*)"
        )
    if "when" in vniah.questions and not all(text.when for text in haystack.texts):
        raise UserError(
            f"vniah.questions={vniah.questions}, and not every needle of {vniah.data} has a question when; write one "
            "into each line, or set vniah.questions=[content]"
        )
    if vniah.distractors and not len(haystack.distractors) and len(haystack.needles) < 2:
        raise UserError(f"vniah.distractors={vniah.distractors}, and {vniah.data} has one needle; add others")


def embedded(model: Any, haystack: Haystack, path: Path, kept: str | None) -> Haystack:
    """The haystack as the model's tower gives it, in bfloat16; read from ``kept`` if the same tower wrote it.

    Args:
        model: of images and videos.
        haystack: pixels or embeddings.
        path: of its file.
        kept: file for the embeddings, which models that share a frozen tower share; None: they are not kept.

    Raises:
        UserError: ``kept`` is of another tower or another haystack.
    """
    if not haystack.has_pixels:
        return haystack
    digest = sha256()
    for name, tensor in sorted(tower_of(model).state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    made_of = {"tower": digest.hexdigest(), "haystack": sha256_of(path)}
    if kept is not None and Path(kept).exists():
        known, header = read_haystack(Path(kept))
        if differing := [name for name, value in made_of.items() if header.get(name) != value]:
            raise UserError(
                f"vniah.embeddings={kept} is of another {' and '.join(differing)}; name another file, or leave it out "
                "for a model that trained its tower"
            )
        return known
    output = partial(tower_output, model)
    frames, needles, distractors = map(output, (haystack.frames, haystack.needles, haystack.distractors))
    made = replace(haystack, frames=frames, needles=needles, distractors=distractors)
    if kept is not None:
        with writing(f"vniah.embeddings={kept}", Path(kept).parent):
            Path(kept).parent.mkdir(parents=True, exist_ok=True)
            write_haystack(Path(kept), made, made_of)
    return made


@torch.inference_mode()
def tower_output(model: Any, frames: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Embeddings of frames, uint16 (frames, tokens, channels) with the bits of bfloat16.

    Args:
        model: of images and videos.
        frames: uint8 (frames, pixel frames, height, width, 3).
    """
    geometry, dtype = tower_geometry(model.config), model.get_input_embeddings().weight.dtype
    parts = [np.empty((0, 1, geometry.width), np.uint16)]
    for start in range(0, len(frames), AT_ONCE):
        part = frames[start : start + AT_ONCE]
        patches = torch.from_numpy(geometry.patches(part.reshape(-1, *part.shape[2:]))).to(model.device)
        grid = [len(part), part.shape[2] // geometry.patch_size, part.shape[3] // geometry.patch_size]
        features = tower_of(model)(pixel_values(patches, dtype), grid_thw=torch.tensor([grid]).to(model.device))
        bits = features.pooler_output.to(torch.bfloat16).view(torch.int16).cpu().numpy().view(np.uint16)
        parts.append(bits.reshape(len(part), -1, geometry.width))
    return np.concatenate(parts[1:] or parts)


class Prompts:
    """Prompts of V-NIAH: a video of embeddings with one needle, a question, its answer and another's as the control."""

    def __init__(self, checkpoint: EvaluatedCheckpoint, haystack: Haystack, vniah: VniahConfig) -> None:
        self.config, self.seed, self.haystack = vniah, checkpoint.config.seed, haystack
        self.encoder = VisualEncoder(DocumentEncoder(checkpoint.tokenizer))
        config = read_config(checkpoint.directory, key="checkpoint")
        self.tower, self.ids, self.speed = tower_geometry(config), placeholders(config), tokens_per_second(config)

    @property
    def cells(self) -> list[tuple[float, int]]:
        """Depth and number of each prompt of a length."""
        return [(depth, sample) for depth in self.config.depths for sample in range(self.config.samples)]

    def texts(self, question: str, frames: int, depth: float, sample: int) -> tuple[str, str]:
        """The question of a prompt and its answer."""
        text = self.haystack.texts[self._needle(sample)]
        if question == "content":
            return text.question, text.answer
        return text.when, quarter_of(needle_place(frames, depth), frames)

    def document(self, question: str, frames: int, depth: float, sample: int) -> PackedSequence:
        """One prompt with its answer: a pure function of the seed, these, and the haystack."""
        rng = random.Random(f"{self.seed}/{frames}/{depth}/{sample}")
        video = self.haystack.video(frames, depth, self._needle(sample), self.config.distractors, rng)
        content = video.reshape(frames * self.haystack.tokens_per_frame, -1)
        footage = Footage(content, (frames, *self.haystack.grid), self.haystack.frame_seconds)
        return self.encoder.encode(Example(footage, *self.texts(question, frames, depth, sample)))

    def answer(self, texts: tuple[str, str]) -> torch.Tensor:
        """The tokens of an answer, to the end of its turn, int64 (m,)."""
        blank = Footage(np.zeros((2, 1, 1, 3), np.uint8), (1, 1, 1), 1.0)
        document = self.encoder.encode(Example(blank, *texts))
        assert document.loss_mask is not None
        return torch.from_numpy(document.tokens[document.loss_mask].astype(np.int64))

    def _needle(self, sample: int) -> int:
        return sample % len(self.haystack.needles)

    def logits(self, reader: ModelReader, document: PackedSequence, axes: PairAxes) -> torch.Tensor:
        """Teacher-forced logits of the answer, float32 (m, vocabulary), at the positions of ``axes``."""
        maker = VisualReader(axes, self.seed, self.tower, self.ids, self.speed, needs_pixels=False)
        batch = maker.completed(collate([document]))
        assert document.loss_mask is not None
        (places,) = np.nonzero(document.loss_mask)
        first, n = int(places[0]), len(document.tokens)
        states = reader.read(batch.input_ids[0], n - first + 1, vision=batch.vision)
        return reader.logits(states[torch.from_numpy(places) - first]).cpu()


def _scores(
    reader: ModelReader, prompts: Prompts, axes: PairAxes, question: str, frames: int, ranks: Ranks
) -> pd.DataFrame:
    """The scores of every prompt of a length, in order; each rank answers its share."""
    cells = prompts.cells
    share: dict[int, dict[str, Any]] = {}
    for number in range(len(cells))[ranks.rank :: ranks.world_size]:
        depth, sample = cells[number]
        document = prompts.document(question, frames, depth, sample)
        answer, control = (
            prompts.answer(prompts.texts(question, frames, *cells[place % len(cells)]))
            for place in (number, number + 1)
        )
        row = {"context_length": frames * prompts.haystack.tokens_per_frame, "depth": depth, "sample": sample}
        share[number] = row | graded(prompts.logits(reader, document, axes), answer, control)
    return pd.DataFrame(in_order(gather(share)))


def _table_row(row: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """A score (share of 1) or loss as a row of the results table, which holds percentages."""
    scale = 1.0 if is_loss(row["metric"]) else 100.0
    own = {"harness": VIDEO_HARNESS, "harness_version": version("ropewalk"), "category": "video"}
    return {**columns, **own, **row, **{name: row[name] * scale for name in ESTIMATE}}


def summarize_vniah(table: pd.DataFrame) -> str:
    """Exact matches over all depths by question, factor and frames, for the terminal."""
    rows = as_shares(
        table[(table["harness"] == VIDEO_HARNESS) & (table["metric"] == "exact_match") & table["depth"].isna()]
    )
    values = rows.set_index(["task", "test_time_scaling", "frames"])["value"].unstack()
    return f"V-NIAH, exact match by frames\n{values.to_string(float_format='{:.2f}'.format)}" if len(values) else ""
