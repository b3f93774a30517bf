"""Proof that stock transformers gives an export the logits that the trainer computes from the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ropewalk.export.findings import STOCK, write_finding
from ropewalk.export.portable import rope_entry
from ropewalk.export.safetensors_files import StoredWeights
from ropewalk.export.source import Source, Weights, trained_source
from ropewalk.export.verify.probing import Probe, probe_of, stock_logits
from ropewalk.model import attention
from ropewalk.model.load import build_for_training, read_position
from ropewalk.model.rotary import assert_spectrum, install_spectrum, stock_spectrum, stock_tolerances

# Both sides compute in fp32 from the same weights; kernels differ in the order of their sums.
TOLERANCE = 1e-3  # of the logits' standard deviation


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Attributes:
        max_abs_difference: largest difference of any logit.
        logit_std: standard deviation of the checkpoint's logits, the scale to judge by.
        tokens: length of the text.
        positions: of them, those whose logits were compared.
        beyond_original: whether the text is longer than the model's original length.
        spectrum_equal: whether the stock process rotates with the same frequencies: bitwise, or, where the export holds
            another stock form than training had, within what float32 rounding explains.
        passed: the difference is within tolerance and the spectrum equal.
    """

    max_abs_difference: float
    logit_std: float
    tokens: int
    positions: int
    beyond_original: bool
    spectrum_equal: bool
    passed: bool

    def __str__(self) -> str:
        verdict = "verified" if self.passed else "NOT VERIFIED"
        spectrum = "equal" if self.spectrum_equal else "DIFFER"
        reach = "past" if self.beyond_original else "NOT past"
        return (
            f"{verdict}: stock transformers, unable to import ropewalk, differs by at most "
            f"{self.max_abs_difference:.2e} at {self.positions} positions of {self.tokens:,} tokens, {reach} the "
            f"original length (logits' standard deviation {self.logit_std:.3f}); frequencies {spectrum}"
        )


def verify_export(checkpoint: Path, directory: Path) -> Verification:
    """Compare a training checkpoint with its export; see :func:`verify_stock`."""
    return verify_stock(trained_source(checkpoint), directory)


def verify_stock(
    source: Source, directory: Path, tokens: int | None = None, report_to: Path | None = None
) -> Verification:
    """Compare the source, as this package computes it, with the export in a process of stock transformers.

    Args:
        source: what was exported.
        directory: where to.
        tokens: of the text; None: past the original length.
        report_to: directory whose verification.json gets the finding; None: the export's.

    Raises:
        Unverifiable: where there is no tokenizer to read text with.
        RuntimeError: where they differ; the finding is written beside the export first.
    """
    probe = probe_of(directory, tokens)
    ours, our_spectrum, explained = source_logits(source, directory, probe)
    (found,) = stock_logits([directory], probe)
    stock, stock_spectra = found["logits"], found["inv_freq"]
    difference, std = float(np.abs(ours - stock).max()), float(ours.std())
    equal = all(_spectrum_agrees(our_spectrum, row, explained) for row in stock_spectra)
    result = Verification(
        max_abs_difference=difference,
        logit_std=std,
        tokens=len(probe.tokens),
        positions=len(probe.rows),
        beyond_original=len(probe.tokens) > source.position.pretrained_length,
        spectrum_equal=equal,
        passed=bool(equal and difference <= TOLERANCE * std),  # not for NaN either
    )
    write_finding(report_to or directory, STOCK, result)
    if not result.passed:
        raise RuntimeError(f"{directory}: {result}")
    return result


def _spectrum_agrees(ours: NDArray[np.float32], stock: NDArray[np.float32], explained: NDArray[np.float64]) -> bool:
    """Bitwise where nothing is to be explained."""
    apart = np.abs(stock.astype(np.float64) - ours)
    return stock.shape == ours.shape and bool(np.all(apart <= explained * ours))


def source_logits(
    source: Source, directory: Path, probe: Probe
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Logits (rows, vocabulary), the frequencies, and by how much of themselves those of the export may differ.

    A training checkpoint goes through the trainer's model and attention, with its own config where nothing was added
    to its chain. The weights are rounded to the export's dtype first, so that only the path is compared.
    """
    weights = source.open()
    config = AutoConfig.from_pretrained(source.origin)
    if source.run_dir is None or source.position.chain != read_position(source.origin).chain:
        config = source.config
    explained = np.zeros(source.position.head_dim // 2)
    if rope_entry(config) != rope_entry(source.config):
        explained = stock_tolerances(source.position.spectrum(), rope_entry(config))
    config.use_cache = False
    trained = source.run_dir is not None
    model = build_for_training(config, None, torch.float32) if trained else _stock_model(config)
    model.eval()
    install_spectrum(model)
    assert_spectrum(model, source.position.spectrum())
    _load(model, weights, directory, source.origin)
    further = {"documents": _one_document(len(probe.tokens))} if trained else {"use_cache": False}
    rows = torch.from_numpy(probe.rows)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(probe.tokens)[None], logits_to_keep=rows, **further).logits[0]
    layered = "rope_type" not in config.rope_parameters
    inv_freq, _ = stock_spectrum(model, "full_attention" if layered else None)
    return logits.numpy(), inv_freq.numpy(), explained


def _stock_model(config: PreTrainedConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _one_document(tokens: int) -> attention.Documents:
    return attention.Documents.from_cu_seqlens(torch.tensor([0, tokens]), torch.device("cpu"))


def _load(model: PreTrainedModel, weights: Weights, directory: Path, origin: Path) -> None:
    """Each weight by itself, rounded to the export's dtype: no second copy of the model."""
    exported = StoredWeights(directory).dtypes()
    missing = dict(model.named_parameters())
    with torch.no_grad():
        for name in weights:
            if name in exported:  # what is not is a buffer of RoPE
                if name not in missing:
                    raise RuntimeError(f"{origin} does not fit its own config: it has {name}, which the model has not")
                missing.pop(name).copy_(weights.gather(name, exported[name]))
    if missing:
        raise RuntimeError(f"{origin} does not fit its own config: missing {sorted(missing)}")
