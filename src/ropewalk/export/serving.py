"""How each engine serves an export: the exact commands, and the memory that its cache needs."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from ropewalk.model import head_dim
from ropewalk.rope import Position


def cache_bytes(config: PreTrainedConfig, tokens: int, bytes_each: int = 2) -> int:
    """Memory of one sequence's keys and values: 2 x layers x key/value heads x head_dim x bytes a token.

    Args:
        config: of the model.
        tokens: length of the sequence.
        bytes_each: of one number; 2 for bf16.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim(config) * bytes_each * tokens


def commands(config: PreTrainedConfig, position: Position, directory: Path) -> list[str]:
    """Markdown lines for a model card; DIR stands for the place of the files."""
    served = config.max_position_embeddings
    lines = [
        f"Keys and values of one sequence of {served:,} tokens take "
        f"{cache_bytes(config, served) / 2**30:.3g} GiB in bf16.",
    ]
    if (directory / "config.json").is_file():
        lines += [
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")  # transformers 4.45 or later',
            'tokenizer = AutoTokenizer.from_pretrained("DIR")',
            "```",
            "",
            "```bash",
            f"vllm serve DIR --max-model-len {served}",
            f"python -m sglang.launch_server --model-path DIR --context-length {served}",
            "```",
        ]
        if position.depends_on_length:
            lines += [
                "",
                f"The chain follows the input's length; these files hold it at {position.trained_length:,} tokens.",
            ]
    files = sorted(path.name for path in directory.glob("*.gguf"))
    if files:
        lines += ["", "```bash", *(f"llama-server --model DIR/{name} --ctx-size {served}" for name in files), "```"]
    return lines
