"""Run a Hugging Face directory with stock transformers, unable to import ropewalk.

python -I stock_probe.py DIRECTORY TOKENS.npy FOUND.npz
"""

import sys

sys.modules["ropewalk"] = None  # type: ignore[assignment]  # from here on `import ropewalk` fails

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(directory: str, given: str, found: str) -> None:
    """Write the logits, float32 (n, vocabulary), and inv_freq as loaded and after the pass, float32 (2, head_dim / 2).

    Both, because a longrope model rotates with its short list as loaded and with its long one past its length.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    as_loaded = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(np.load(given))[None], use_cache=False).logits[0]
    spectra = torch.stack([as_loaded, model.model.rotary_emb.inv_freq])
    np.savez(found, logits=logits.numpy(), inv_freq=spectra.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
