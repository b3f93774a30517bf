"""Proof that stock transformers gives an export the checkpoint's own logits."""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoTokenizer

from ropewalk import attention
from ropewalk.export.zero_weights import ZeroWeights
from ropewalk.files import write_atomically
from ropewalk.model import build_for_training
from ropewalk.rope.position import position_of
from ropewalk.rotary import assert_spectrum, install_spectrum

# Both sides compute in fp32 from the same weights; kernels differ in the order of their sums.
TOLERANCE = 1e-3  # of the logits' standard deviation
MAX_TOKENS = 4096
REPORT = "verification.json"


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Attributes:
        max_abs_difference: largest difference of any logit.
        logit_std: standard deviation of the checkpoint's logits, the scale to judge by.
        tokens: positions compared.
        spectrum_equal: whether the stock process rotates with bitwise the same frequencies.
        passed: the difference is within tolerance and the spectrum equal.
    """

    max_abs_difference: float
    logit_std: float
    tokens: int
    spectrum_equal: bool
    passed: bool

    def __str__(self) -> str:
        verdict = "verified" if self.passed else "NOT VERIFIED"
        spectrum = "bitwise equal" if self.spectrum_equal else "DIFFER"
        return (
            f"{verdict}: stock transformers, unable to import ropewalk, differs by at most "
            f"{self.max_abs_difference:.2e} over {self.tokens} positions (logits' standard deviation "
            f"{self.logit_std:.3f}); frequencies {spectrum}"
        )


def verify_export(checkpoint: Path, directory: Path) -> Verification:
    """Compare the checkpoint, as the trainer computes it, with the export in a process of stock transformers.

    The text is a module of the interpreter's standard library, to twice the trained length or 4,096 tokens.

    Raises:
        RuntimeError: where they differ; the finding is written beside the export first.
    """
    tokens = probe_tokens(directory)
    ours, our_spectrum = checkpoint_logits(checkpoint, directory, tokens)
    stock, stock_spectrum = stock_logits(directory, tokens)
    difference, std = float(np.abs(ours - stock).max()), float(ours.std())
    equal = all(np.array_equal(our_spectrum, row) for row in stock_spectrum)
    result = Verification(difference, std, len(tokens), equal, equal and difference <= TOLERANCE * std)
    write_atomically(directory / REPORT, json.dumps(asdict(result), indent=2) + "\n")
    if not result.passed:
        raise RuntimeError(f"{directory}: {result}")
    return result


def probe_tokens(directory: Path) -> NDArray[np.int64]:
    """Tokens of real text, int64 (n,): past the trained length where the limit allows."""
    trained = position_of(AutoConfig.from_pretrained(directory)).trained_length
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.encode(inspect.getsource(argparse), add_special_tokens=False)
    return np.array(ids[: min(2 * trained, MAX_TOKENS)], dtype=np.int64)


def checkpoint_logits(
    checkpoint: Path, directory: Path, tokens: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (n, vocabulary) and frequencies, from the ZeRO shards through the trainer's attention.

    The weights are rounded to the export's dtype first, so that only the path is compared.
    """
    exported = AutoConfig.from_pretrained(directory)
    config = AutoConfig.from_pretrained(checkpoint)
    config.use_cache = False
    model = build_for_training(config, None, torch.float32).eval()
    install_spectrum(model)
    assert_spectrum(model, position_of(config).spectrum())
    weights = ZeroWeights(checkpoint, tied=bool(config.tie_word_embeddings))
    rounded = {name: weight.to(exported.dtype).float() for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(rounded, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"{checkpoint} does not fit its own config: missing {missing}, unexpected {unexpected}")
    documents = attention.Documents.from_cu_seqlens(torch.tensor([0, len(tokens)]), torch.device("cpu"))
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens)[None], documents=documents).logits[0]
    return logits.numpy(), model.get_decoder().rotary_emb.inv_freq.numpy()


def stock_logits(directory: Path, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The same from a fresh process that cannot import ropewalk; two rows of frequencies (see stock_probe.py)."""
    probe = Path(__file__).with_name("stock_probe.py")
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "tokens.npy", Path(scratch) / "found.npz"
        np.save(given, tokens)
        done = subprocess.run(
            [sys.executable, "-I", str(probe), str(directory), str(given), str(found)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"stock transformers could not load {directory}:\n{done.stderr[-2000:]}")
        with np.load(found) as arrays:
            return arrays["logits"], arrays["inv_freq"]
