"""Visuals of a batch as a model of images and videos takes them: patches, their places, and three positions a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from ropewalk.data.order.batches import Batch, VisionInputs, VisualKey, collate, rows_of
from ropewalk.data.order.mixture import Mixture, SequenceRef
from ropewalk.data.store.hashing import stable_key
from ropewalk.data.store.reader import JoinedStore
from ropewalk.data.store.visuals import COLUMNS, Visual
from ropewalk.errors import UserError
from ropewalk.rope.pair_axes import PairAxes
from ropewalk.rope.video_positions import Grid, Segment, token_positions

# Seconds that a stored time may be short of the true one: 2/6 s is kept as 0.333333, three of which must still be 1.
HALF_MICROSECOND = 0.5e-6
IN_SECONDS = ("mrope", "mrope_v5")  # rules that read a model's clock, if it has one


def temporal_scale(scales: Sequence[float], seed: int, key: VisualKey) -> float:
    """The positions that a frame of this visual takes in this epoch: one of ``scales``, each as likely.

    A pure function of its arguments, so that it is the same for any number of ranks and after any resume.
    """
    return float(scales[stable_key("temporal_scale", seed, *key) % len(scales)])


@dataclass(frozen=True)
class TowerGeometry:
    """The sizes by which a vision tower cuts pixels.

    Attributes:
        patch_size: pixels along a patch.
        temporal_patch_size: pixel frames of a patch.
        merge_size: patches along a token.
        width: channels of its output, as of the language model.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    width: int

    @property
    def pixels(self) -> int:
        """Pixels along a token."""
        return self.patch_size * self.merge_size

    def patches(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Pixels in the order that Qwen2-VL's towers take them (transformers' Qwen2VLImageProcessor.patchify).

        Args:
            frames: uint8 (frames, height, width, 3); one frame is an image, which is repeated.

        Returns:
            uint8 (patches, 3 x temporal_patch_size x patch_size^2), the patches of a token together.
        """
        step, patch, merge = self.temporal_patch_size, self.patch_size, self.merge_size
        if len(frames) == 1:
            frames = np.repeat(frames, step, axis=0)
        count, height, width, _ = frames.shape
        blocks = frames.reshape(
            count // step, step, height // self.pixels, merge, patch, width // self.pixels, merge, patch, 3
        )
        ordered = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        return np.ascontiguousarray(ordered).reshape(-1, 3 * step * patch * patch)


@dataclass(frozen=True)
class VisualReader:
    """Makes the vision inputs of batches; one object for a run.

    Attributes:
        axes: of the run's chain: the rule for positions and its temporal scales.
        seed: that the scales are drawn by.
        tower: sizes of the model's vision tower.
        placeholders: ids of the tokens that visuals replace.
        tokens_per_second: positions a second of a video under IN_SECONDS (Qwen2.5-VL); None: one a frame.
        needs_pixels: some store of the run holds pixels, so every micro batch passes the tower.
    """

    axes: PairAxes
    seed: int
    tower: TowerGeometry
    placeholders: tuple[int, ...]
    tokens_per_second: float | None
    needs_pixels: bool

    def time_step(self, visual: Visual, key: VisualKey) -> float:
        """Positions from one frame of a visual to the next."""
        if self.axes.positions == "diagonal":
            return temporal_scale(self.axes.temporal_scales, self.seed, key)
        if self.tokens_per_second is None:
            return 1.0
        return self.tokens_per_second * (visual.frame_seconds + HALF_MICROSECOND)  # an image has one frame, at 0

    def completed(self, batch: Batch) -> Batch:
        """The batch with its vision inputs.

        ZeRO-3 gathers the tower's weights on all ranks at once, so where any micro batch has pixels, every one passes
        the tower: one without takes a single black token, whose output goes nowhere.

        Raises:
            UserError: for a visual whose tokens are not placeholders of this model.
        """
        self._check_placeholders(batch)
        pixels = [visual for visual in batch.visuals if visual.has_pixels]
        ready = [visual for visual in batch.visuals if not visual.has_pixels]
        patches = grids = None
        if self.needs_pixels:
            black = np.zeros((1, self.tower.pixels, self.tower.pixels, 3), np.uint8)
            contents = [np.asarray(visual.content, np.uint8) for visual in pixels] or [black]
            sizes = [(visual.frames, visual.height, visual.width) for visual in pixels] or [(1, 1, 1)]
            patches = torch.from_numpy(np.concatenate([self.tower.patches(content) for content in contents]))
            grids = torch.tensor(sizes) * torch.tensor([1, self.tower.merge_size, self.tower.merge_size])
        embeddings = np.concatenate([np.zeros((0, self.tower.width), np.uint16), *(visual.content for visual in ready)])
        vision = VisionInputs(
            positions=torch.from_numpy(self.positions(batch).astype(np.float32))[:, None],
            pixel_places=_places(pixels),
            patches=patches,
            grids=grids,
            embedding_places=_places(ready),
            embeddings=torch.from_numpy(embeddings.view(np.int16)).view(torch.bfloat16),
        )
        return replace(batch, vision=vision)

    def positions(self, batch: Batch) -> NDArray[np.float64]:
        """Time, height and width of each token, float64 (3, N), from 0 in each document."""
        visuals = list(zip(batch.visuals, batch.visual_keys, strict=True))
        parts = []
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            inside = [(visual, self.time_step(visual, key)) for visual, key in visuals if start <= visual.start < end]
            parts.append(token_positions(self.axes.positions, _segments(start, end, inside))[0])
        return np.concatenate(parts, axis=1)

    def drawn(self, mixture: Mixture, step: int) -> list[list[str | int | float]]:
        """Domain, row, number, epoch and temporal scale of every visual in the global batch of ``step``, by index."""
        return [
            [*key, temporal_scale(self.axes.temporal_scales, self.seed, key)]
            for ref in mixture.global_batch(step)
            for key in _keys(mixture.store, ref)
        ]

    def check_order(self, mixture: Mixture) -> None:
        """Check the tokens of each domain's first visual, and all times; every batch checks its own tokens.

        Raises:
            UserError: for a visual whose tokens are not placeholders of this model, or a video without the time between
                its frames under a model that counts in seconds.
        """
        store = mixture.store
        for domain in _domains(mixture):
            index = _columns(store, domain)
            is_timeless = (index["frames"] > 1) & (index["microseconds"] < 1)
            if self.tokens_per_second is not None and self.axes.positions in IN_SECONDS and is_timeless.any():
                raise UserError(
                    f"{domain} holds {is_timeless.sum()} videos without the time between their frames, which this "
                    f"model's clock of {self.tokens_per_second:g} positions a second needs under "
                    f"positions={self.axes.positions}; write them with frame_seconds"
                )
            row = next(row for row in count() if len(store.visual_index(domain, row)))
            self._check_placeholders(collate([store.read(domain, row)], rows=[(domain, row, 0)]))

    def _check_placeholders(self, batch: Batch) -> None:
        tokens = batch.input_ids[0].numpy()
        is_stray = np.isin(tokens, self.placeholders)
        for visual in batch.visuals:
            is_stray[visual.start : visual.end] = False
        if is_stray.any():
            raise UserError(
                f"a row has {is_stray.sum()} of the model's placeholders {self.placeholders} that no visual stands "
                f"behind, at {is_stray.argmax()} first; write the store with a Visual for each stretch of them"
            )
        for visual, key in zip(batch.visuals, batch.visual_keys, strict=True):
            foreign = set(tokens[visual.start : visual.end].tolist()) - set(self.placeholders)
            if foreign:
                raise UserError(
                    f"visual {key.number} of sequence {key.row} of {key.domain} stands for token {min(foreign)}, which "
                    f"is not one of this model's placeholders {self.placeholders}; prepare the store with the model's "
                    "tokenizer, or give a model from scratch its image_token_id and video_token_id"
                )


def check_contents(mixture: Mixture, tower: TowerGeometry) -> bool:
    """Check that every visual of an order is of the tower's sizes; True if any of them holds pixels.

    Raises:
        UserError: naming the domain, what is there and what the tower takes.
    """
    has_pixels = False
    for domain in _domains(mixture):
        index = _columns(mixture.store, domain)
        is_pixels = index["is_pixels"] == 1
        frames = np.where(index["first"] == 1, tower.temporal_patch_size, index["first"])
        fits = frames == index["frames"] * tower.temporal_patch_size
        fits &= (index["second"] == index["height"] * tower.pixels) & (index["third"] == index["width"] * tower.pixels)
        if not fits[is_pixels].all():
            raise UserError(
                f"{domain} holds pixels of another size than {tower.pixels} a token and {tower.temporal_patch_size} "
                "frames a position, which this model's tower takes; prepare it with this model's sizes"
            )
        widths = index["first"][~is_pixels]
        if not (widths == tower.width).all():
            raise UserError(
                f"{domain} holds embeddings of {widths[widths != tower.width][0]} channels and the model has "
                f"{tower.width}; prepare it with this model's tower"
            )
        has_pixels |= bool(is_pixels.any())
    return has_pixels


def _domains(mixture: Mixture) -> list[str]:
    """Domains of an order that hold visuals."""
    domains = mixture.store.domains
    return [name for name, info in domains.items() if info.visuals is not None and name not in mixture.unused]


def _columns(store: JoinedStore, domain: str) -> dict[str, NDArray[np.int64]]:
    """The index of a domain's visuals, by the names of its columns."""
    return dict(zip(COLUMNS, store.visual_index(domain).T, strict=True))


def _keys(store: JoinedStore, ref: SequenceRef) -> Iterator[VisualKey]:
    for domain, row, epoch in rows_of(ref):
        for number in range(len(store.visual_index(domain, row))):
            yield VisualKey(domain, row, number, epoch)


def _segments(start: int, end: int, visuals: Sequence[tuple[Visual, float]]) -> Iterator[Segment]:
    for visual, time_step in visuals:
        yield visual.start - start
        yield Grid(visual.frames, visual.height, visual.width, time_step)
        start = visual.end
    yield end - start


def _places(visuals: Sequence[Visual]) -> torch.Tensor:
    empty = torch.zeros(0, dtype=torch.int64)
    return torch.cat([empty, *(torch.arange(visual.start, visual.end) for visual in visuals)])
