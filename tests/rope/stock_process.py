"""Every checkpoint under a directory, in a process of stock transformers that cannot import ropewalk."""

import sys

sys.modules["ropewalk"] = None

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

# one sequence of far-apart tokens; a mask of its own keeps stock attention from taking the gaps for documents
POSITIONS = [0, 1, 2, 99, 4095, 8191, 8192, 65535, 65536, 131072, 262143, 262144]


def read(directory: Path) -> dict[str, np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    n = len(POSITIONS)
    causal = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        found = model(
            input_ids=torch.arange(n)[None] * 7,
            position_ids=torch.tensor([POSITIONS]),
            attention_mask=causal,
            use_cache=False,
        )
    rotary = model.get_decoder().rotary_emb
    return {"logits": found.logits[0].numpy(), "inv_freq": rotary.inv_freq.numpy()}


if __name__ == "__main__":
    for directory in sorted(Path(sys.argv[1]).iterdir()):
        np.savez(directory / "found.npz", **read(directory))
