"""lmms-eval on an export whose positions transformers does not count: DIR FACTOR ARGUMENTS OF LMMS-EVAL.

For an environment of lmms-eval's own, with this repository's ``src`` on PYTHONPATH (numpy alone is needed of it). Stock
Qwen2VLModel asks ``get_rope_index`` for positions; here it counts by the rule of the export's chain, at ``FACTOR``
positions a frame where the rule has one.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ropewalk.rope import Position
from ropewalk.rope.pair_axes import PairAxes
from ropewalk.rope.video_positions import Grid, Segment, token_positions


def positions_of(
    model: Any, axes: PairAxes, input_ids: Tensor, grids: dict[int, Iterator[list[int]]]
) -> tuple[Tensor, float]:
    """Positions of one row, float32 (3, tokens), and what a generated token adds to its place in the row.

    Args:
        model: stock Qwen2VLModel.
        axes: rule and factor.
        input_ids: int64 (tokens,), without padding.
        grids: of the row's images and of its videos in order, in patches, by the id of their placeholder.
    """
    merge = model.config.vision_config.spatial_merge_size
    segments: list[Segment] = []
    for token, group in groupby(input_ids.tolist(), key=lambda token: token if token in grids else None):
        length = len(list(group))
        if token is None:
            segments.append(length)
        while token is not None and length > 0:  # visuals without text between them
            frames, height, width = next(grids[token])
            grid = Grid(frames, height // merge, width // merge, axes.temporal_scales[0])
            segments.append(grid)
            length -= grid.tokens
    placed, following = token_positions(axes.positions, segments)
    return torch.from_numpy(placed).float(), following - input_ids.numel()


def install(model_class: Any, axes: PairAxes) -> None:
    """Have a stock class (Qwen2VLModel) count positions by these axes."""

    def get_rope_index(
        self: Any,
        input_ids: Tensor,
        *_: Any,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        tables = {self.config.image_token_id: image_grid_thw, self.config.video_token_id: video_grid_thw}
        grids = {token: iter([] if table is None else table.tolist()) for token, table in tables.items()}
        is_real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = torch.ones(3, *input_ids.shape, device=input_ids.device)
        deltas = torch.zeros(len(input_ids), 1, device=input_ids.device)
        for row, (ids, real) in enumerate(zip(input_ids, is_real.bool(), strict=True)):
            placed, delta = positions_of(self, axes, ids[real], grids)
            positions[:, row, real], deltas[row] = placed.to(positions), delta
        return positions, deltas

    model_class.get_rope_index = get_rope_index


def main() -> None:
    """Install the export's rule, then run lmms-eval with the arguments that are left."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    directory, factor = sys.argv[1], float(sys.argv[2])
    axes = Position.from_pretrained(directory).axes
    if axes is None:
        sys.exit(f"error: {directory} is of text alone; name the export of a Qwen2-VL")
    install(Qwen2VLModel, replace(axes, temporal_scales=(factor if axes.positions == "diagonal" else 1.0,)))
    sys.argv[1:3] = []
    runpy.run_module("lmms_eval", run_name="__main__")


if __name__ == "__main__":
    main()
