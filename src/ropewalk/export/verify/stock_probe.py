"""Probe of stock transformers: runs Hugging Face directories, unable to import ropewalk.

python -I stock_probe.py JOB.json

JOB.json: {"texts": [{"tokens": TOKENS.npy, "rows": ROWS.npy}, ...], "models": {Hugging Face directory: ANSWER.npz}}; of
a text for a model of images and videos "position_ids", "pixel_values_videos" and "video_grid_thw", too, all .npy files.
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
    """Write logits0, float32 (rows, vocabulary), and inv_freq0, float32 (2, head_dim / 2), of the first text, ...

    The frequencies as loaded and after the pass, because a longrope model rotates with its short list as loaded and
    with its long one past its length. Where layer types rotate differently, head_dim / 2 of each, one after the other
    by the types' names. Each text is read by a model that has read nothing.
    """
    given = json.loads(Path(job).read_text(encoding="utf-8"))
    for directory, answer in given["models"].items():
        found: dict[str, np.ndarray] = {}
        for number, text in enumerate(given["texts"]):
            logits, inv_freq = read(directory, {name: torch.from_numpy(np.load(path)) for name, path in text.items()})
            found |= {f"logits{number}": logits.numpy(), f"inv_freq{number}": inv_freq.numpy()}
        np.savez(answer, allow_pickle=False, **found)


def read(directory: str, text: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and frequencies of a model that is loaded for it, and let go of before the next."""
    video = {name: text[name] for name in VIDEO if name in text}
    kind = AutoModelForImageTextToText if video else AutoModelForCausalLM
    model = kind.from_pretrained(directory, dtype=torch.float32).eval()
    rotary = model.get_decoder().rotary_emb
    names = [name for name, _ in rotary.named_buffers(recurse=False) if name.endswith("inv_freq")]
    names = sorted(name for name in names if "original" not in name)
    as_loaded = torch.cat([getattr(rotary, name) for name in names])
    with torch.no_grad():
        logits = model(input_ids=text["tokens"][None], use_cache=False, logits_to_keep=text["rows"], **video).logits[0]
    return logits, torch.stack([as_loaded, torch.cat([getattr(rotary, name) for name in names])])


if __name__ == "__main__":
    main(sys.argv[1])
