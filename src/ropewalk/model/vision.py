"""Vision: the tower of a Qwen2-VL model, its sizes, and its output put in the place of placeholder tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ropewalk.config.train import VISION_MODEL_TYPES
from ropewalk.data.order.batches import VisionInputs
from ropewalk.data.order.visual_batches import TowerGeometry
from ropewalk.errors import UserError


def has_vision(config: PreTrainedConfig) -> bool:
    """True for a model of images and videos that can be trained here."""
    return config.model_type in VISION_MODEL_TYPES


def tower_of(lm: PreTrainedModel) -> nn.Module:
    """The vision tower, with the layer that merges its patches into tokens."""
    tower: nn.Module = lm.model.visual
    return tower


def tower_geometry(config: PreTrainedConfig) -> TowerGeometry:
    """The sizes by which the tower of a model with this config cuts pixels.

    Raises:
        UserError: for a tower whose output is not as wide as the language model.
    """
    vision, width = config.vision_config, config.get_text_config().hidden_size
    key = "out_hidden_size" if hasattr(vision, "out_hidden_size") else "hidden_size"  # Qwen2.5-VL's, Qwen2-VL's
    if getattr(vision, key) != width:
        raise UserError(
            f"vision_config.{key}={getattr(vision, key)}, the channels of the tower's output, and the language model's "
            f"hidden_size={width}; they must be equal"
        )
    return TowerGeometry(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        width=width,
    )


def tokens_per_second(config: PreTrainedConfig) -> float | None:
    """Positions a second of video that a model was released with (Qwen2.5-VL); None: one a frame (Qwen2-VL)."""
    value = getattr(config.vision_config, "tokens_per_second", None)
    return None if value is None else float(value)


def placeholders(config: PreTrainedConfig) -> tuple[int, int]:
    """Ids of the tokens that stand for images and for videos."""
    return config.image_token_id, config.video_token_id


def embed(lm: PreTrainedModel, input_ids: Tensor, vision: VisionInputs) -> Tensor:
    """Embeddings of a row, the tower's output and stored embeddings in the place of placeholders.

    The tower is called once whatever the row holds, so that every rank gathers its weights together under ZeRO-3. A
    frozen tower runs without gradients.

    Args:
        lm: Qwen2-VL or Qwen2.5-VL.
        input_ids: int64 (1, N).
        vision: of that row.

    Returns:
        (1, N, width), in the model's dtype.
    """
    embedded: Tensor = lm.get_input_embeddings()(input_ids)
    rows = embedded[0]
    if vision.patches is not None:
        tower: Any = tower_of(lm)
        is_trained = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
        with torch.set_grad_enabled(is_trained):
            features = tower(pixel_values(vision.patches, rows.dtype), grid_thw=vision.grids).pooler_output
        if len(vision.pixel_places):
            rows = rows.index_copy(0, vision.pixel_places, features.to(rows.dtype))
        else:  # backward reaches the tower on every rank all the same
            rows = rows + 0.0 * features.sum()
    if len(vision.embedding_places):
        rows = rows.index_copy(0, vision.embedding_places, vision.embeddings.to(rows.dtype))
    return rows[None]


def pixel_values(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """Patches of bytes, uint8 (patches, 3 x values), in the units that Qwen2-VL's own processor gives."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=patches.device)[:, None]
        for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    scaled = patches.view(len(patches), 3, -1).float() / 255
    return ((scaled - mean) / std).flatten(1).to(dtype)
