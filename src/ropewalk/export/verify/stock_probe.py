"""Probe of stock transformers: runs Hugging Face directories, unable to import ropewalk.

python -I stock_probe.py JOB.json

JOB.json: {"tokens": TOKENS.npy, "rows": ROWS.npy, "models": {Hugging Face directory: ANSWER.npz}}; for a model of
images and videos "position_ids", "pixel_values_videos" and "video_grid_thw" too, each a .npy file.
"""

import sys

sys.modules["ropewalk"] = None  # type: ignore[assignment]  # from here on `import ropewalk` fails

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

VIDEO = ("position_ids", "pixel_values_videos", "video_grid_thw")


def main(job: str) -> None:
    """Write logits, float32 (rows, vocabulary), and inv_freq as loaded and after the pass, float32 (2, head_dim / 2).

    Both, because a longrope model rotates with its short list as loaded and with its long one past its length. Where
    layer types rotate differently, head_dim / 2 of each, one after the other by the types' names.
    """
    given = json.loads(Path(job).read_text(encoding="utf-8"))
    ids, rows = torch.from_numpy(np.load(given["tokens"]))[None], torch.from_numpy(np.load(given["rows"]))
    video = {name: torch.from_numpy(np.load(given[name])) for name in VIDEO if name in given}
    kind = AutoModelForImageTextToText if video else AutoModelForCausalLM
    for directory, answer in given["models"].items():
        model = kind.from_pretrained(directory, dtype=torch.float32).eval()
        rotary = model.get_decoder().rotary_emb
        names = [name for name, _ in rotary.named_buffers(recurse=False) if name.endswith("inv_freq")]
        names = sorted(name for name in names if "original" not in name)
        as_loaded = torch.cat([getattr(rotary, name) for name in names])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=rows, **video).logits[0]
        after = torch.cat([getattr(rotary, name) for name in names])
        np.savez(answer, logits=logits.numpy(), inv_freq=torch.stack([as_loaded, after]).numpy())


if __name__ == "__main__":
    main(sys.argv[1])
