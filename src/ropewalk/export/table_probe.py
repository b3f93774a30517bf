"""Ask vLLM or SGLang for the rotary table that it serves a model with, unable to import ropewalk.

python -I table_probe.py ENGINE DIRECTORY POSITIONS FOUND.npz
"""

import sys

sys.modules["ropewalk"] = None  # type: ignore[assignment]  # from here on `import ropewalk` fails

import inspect
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig


def main(engine: str, directory: str, positions: str, found: str) -> None:
    """Write cos and sin, float32 (positions, head_dim / 2) each, attention scaling included, and the version."""
    config = AutoConfig.from_pretrained(directory)
    get_rope, context, version = _engine(engine)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    entry = dict(config.rope_parameters)
    given: dict[str, Any] = {
        "head_size": head_dim,
        "rotary_dim": head_dim,
        "max_position": config.max_position_embeddings,
        "base": entry["rope_theta"],
        "is_neox_style": True,
        "rope_parameters": entry,
        "rope_scaling": None if entry["rope_type"] == "default" else entry,
        "dtype": torch.float32,
    }
    accepted = inspect.signature(get_rope).parameters
    with context:
        rope = get_rope(**{name: value for name, value in given.items() if name in accepted})
    table = getattr(rope, "cos_sin_cache", None)
    if table is None:
        table = rope.long_short_cos_sin_cache  # longrope: the short list's table first, then the long one's
    cos, sin = table[: int(positions)].float().cpu().chunk(2, dim=-1)
    np.savez(found, cos=cos.numpy(), sin=sin.numpy(), version=version)


def _engine(name: str) -> tuple[Any, Any, str]:
    if name == "vllm":
        import vllm
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.rotary_embedding import get_rope

        return get_rope, set_current_vllm_config(VllmConfig()), vllm.__version__
    import sglang
    from sglang.srt.layers.rotary_embedding import get_rope

    return get_rope, nullcontext(), sglang.__version__


if __name__ == "__main__":
    main(*sys.argv[1:])
