"""Probe of vLLM's and SGLang's rotary tables, read off rotated queries; unable to import ropewalk.

python -I table_probe.py JOB.json

JOB.json: {"engine": "vllm" or "sglang", "positions": how many, "models": {Hugging Face directory: ANSWER.npz}}
"""

import json
import os
import sys

sys.modules["ropewalk"] = None  # type: ignore[assignment]  # from here on `import ropewalk` fails

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def main(job: str) -> None:
    """Write cos and sin, float32 (positions, rotated channels / 2) each, attention scaling included, and the version.

    They are read off rotated vectors, whose first half is 1 and whose second half is 0, so that whatever stands between
    the engine's table and its queries (which list is taken, which row) is in them. An engine may take a list by the
    positions of a call, so the rows about the length at which lists change are read one at a time, as in decoding.
    Where the model scales queries by their position, that factor is written too, float32 (positions,).
    """
    with open(job, encoding="utf-8") as file:
        given = json.load(file)
    positions = given["positions"]
    for directory, answer in given["models"].items():
        rope, head_dim, rotated, version, scale = {"vllm": _vllm, "sglang": _sglang}[given["engine"]](directory)
        half = torch.zeros(positions, head_dim)
        half[:, : rotated // 2] = 1
        # the engines' own PyTorch path has the table of their GPU kernels
        rotate: Callable[..., Any] = getattr(rope, "forward_native", rope.forward)
        rows = torch.arange(positions)
        queries, _ = rotate(rows, half.clone(), half.clone())
        change = getattr(rope, "original_max_position_embeddings", positions)
        for row in range(max(0, change - 1), min(positions, change + 2)):
            queries[row], _ = rotate(rows[row : row + 1], half[row : row + 1].clone(), half[row : row + 1].clone())
        cos, sin = queries[:, :rotated].float().chunk(2, dim=-1)
        factor = {} if scale is None else {"query": scale(rows).flatten().numpy()}
        np.savez(answer, cos=cos.numpy(), sin=sin.numpy(), version=version, **factor)


_Read = tuple[Any, int, int, str, Callable[..., Any] | None]


def _vllm(directory: str) -> _Read:
    """Its rotary class, the channels of a head, those that are rotated, its version, and the factor on queries."""
    import vllm
    from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    # its own reading of the directory; a longrope class looks up max_model_len in it
    model = ModelConfig(directory, skip_tokenizer_init=True, dtype="float32", enforce_eager=True)
    config, head_dim = model.hf_text_config, model.get_head_size()
    entry = config.rope_parameters
    with set_current_vllm_config(VllmConfig(model_config=model, device_config=DeviceConfig(device="cpu"))):
        rope = get_rope(head_dim, config.max_position_embeddings, rope_parameters=entry, dtype=torch.float32)
    return rope, head_dim, _rotated(head_dim, entry), vllm.__version__, _vllm_scale(config)


def _vllm_scale(config: Any) -> Callable[..., Any] | None:
    """The method of its attention that scales queries, on the values that its constructor reads from the config."""
    if "llama_4_scaling_beta" not in config.rope_parameters:
        return None
    from vllm.model_executor.models.mistral import MistralAttention

    read = getattr(config, "llama_4_scaling", None)
    if read is None:  # it scales none, and says nothing
        return torch.ones_like
    attention = SimpleNamespace(
        llama_4_scaling_beta=read["beta"],
        llama_4_scaling_original_max_position_embeddings=read["original_max_position_embeddings"],
    )
    return partial(MistralAttention._get_llama_4_attn_scale, attention)


def _sglang(directory: str) -> _Read:
    """The same of SGLang, called as its models/llama.py calls it."""
    if not torch.cuda.is_available():
        # read when it is imported; without it plain RoPE on a machine without a GPU asks for vLLM's kernels
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    import sglang
    from sglang.srt.layers.rotary_embedding import get_rope
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    entry = dict(config.rope_parameters)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = _rotated(head_dim, entry)
    rope = get_rope(
        head_dim,
        rotary_dim=rotated,
        max_position=config.max_position_embeddings,
        base=entry["rope_theta"],
        rope_scaling=entry,
        dtype=torch.float32,
    )
    return rope, head_dim, rotated, sglang.__version__, None


def _rotated(head_dim: int, entry: dict[str, Any]) -> int:
    return int(head_dim * entry.get("partial_rotary_factor", 1.0))


if __name__ == "__main__":
    main(sys.argv[1])
