"""Proof that llama.cpp computes from a GGUF file what stock transformers computes from the directory."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, AutoTokenizer

from ropewalk.export.findings import Unverifiable, write_finding
from ropewalk.export.gguf.gguf_check import position_faults
from ropewalk.export.gguf.gguf_file import gguf_type, write_gguf
from ropewalk.export.gguf.gguf_position import GgufPosition, gguf_position
from ropewalk.export.portable import OLDER
from ropewalk.export.verify.probing import Probe, llama_logits, probe_of, stock_logits
from ropewalk.rope.position import METADATA_KEY, position_of

MAX_TOKENS = 2048
RATIO = 1.5  # of the plain-RoPE baseline, that the method's difference may reach
CLEAR = 1.5  # times that limit, which the control must pass to count as failing clearly
FLOOR = 1e-5  # of the logits' standard deviation: a baseline below it is rounding
# Of the logits' standard deviation: how far two engines that agree on everything may be apart. llama.cpp rounds the
# activations of every product to the file's type as well.
BASELINE = {"f32": 1e-3, "f16": 0.02, "bf16": 0.1, "q8_0": 0.2}


@dataclass(frozen=True)
class GgufVerification:
    """What the comparison found; differences are root mean squares over all compared logits.

    Attributes:
        difference: llama.cpp against transformers, both with the method.
        baseline: the same two engines, both with plain RoPE and the same weights.
        control: llama.cpp with plain RoPE against transformers with the method: what a lost method looks like.
        logit_std: standard deviation of transformers' logits.
        argmax_agreement: share of positions where both engines choose the same token.
        tokens: length of the text.
        tokens_equal: whether llama.cpp cuts the text into the same tokens.
        faults: what the file's own metadata and factors get wrong.
        type: of the file's matrices.
        passed: None where the control does not fail, so that the comparison could not tell.
    """

    difference: float
    baseline: float
    control: float
    logit_std: float
    argmax_agreement: float
    tokens: int
    tokens_equal: bool
    faults: list[str]
    type: str
    passed: bool | None

    def __str__(self) -> str:
        verdict = {True: "verified", False: "NOT VERIFIED", None: "could not tell"}[self.passed]
        cut = "the same tokens" if self.tokens_equal else "OTHER TOKENS"
        faults = "".join(f"; {fault}" for fault in self.faults)
        return (
            f"{verdict}: llama.cpp on the {self.type} file differs by {self.difference:.2e} from transformers, where "
            f"plain RoPE differs by {self.baseline:.2e} and the method lost by {self.control:.2e} (logits' standard "
            f"deviation {self.logit_std:.3f}, {self.tokens:,} tokens, arg-max agrees at {self.argmax_agreement:.1%}); "
            f"{cut}{faults}"
        )


def verify_gguf(directory: Path, path: Path, wanted: str | None, tokens: int | None = None) -> GgufVerification:
    """Compare a GGUF file with the directory that it was made from.

    Args:
        directory: Hugging Face directory.
        path: the file.
        wanted: its type; None: that of the directory.
        tokens: of the text, at most MAX_TOKENS; None: as many.

    Raises:
        Unverifiable: where llama.cpp is not installed, or there is no tokenizer to read text with.
        RuntimeError: where they differ; the finding is recorded first.
    """
    if importlib.util.find_spec("cyllama") is None:
        raise Unverifiable("not verified: cyllama is not installed (pip install --no-deps cyllama==0.2.18)")
    probe = probe_of(directory, min(tokens or MAX_TOKENS, MAX_TOKENS))
    config = AutoConfig.from_pretrained(directory)
    own = gguf_position(position_of(config), config.max_position_embeddings)
    lost = lost_position(own)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".verification-") as scratch:
        plain_file, plain_directory = Path(scratch) / "plain.gguf", Path(scratch) / "plain"
        write_gguf(directory, plain_file, wanted, instead=lost)
        make_plain(directory, plain_directory, lost.freq_base)
        reference, plain = (found["logits"] for found in stock_logits([directory, plain_directory], probe))
        found, found_plain = llama_logits([path, plain_file], probe)
    tokens_equal = _same_tokens(found["tokens"], directory, probe)
    logits = reference, plain, found["logits"], found_plain["logits"]
    result = judge(*logits, gguf_type(wanted, config), probe, tokens_equal, position_faults(path, own))
    write_finding(path.parent, engine_name(path), result)
    if result.passed is False:
        raise RuntimeError(f"{path}: {result}")
    return result


def engine_name(path: Path) -> str:
    """What the findings call llama.cpp on this file."""
    return f"llama.cpp {path.name}"


def judge(
    reference: NDArray[np.float32],
    plain: NDArray[np.float32],
    ours: NDArray[np.float32],
    ours_plain: NDArray[np.float32],
    kind: str,
    probe: Probe,
    tokens_equal: bool,
    faults: list[str],
) -> GgufVerification:
    """The verdict on logits (rows, vocabulary) of transformers and llama.cpp, with the method and without."""
    std = float(reference.std())
    difference, baseline, control = _rms(ours - reference), _rms(ours_plain - plain), _rms(ours_plain - reference)
    limit = RATIO * max(baseline, FLOOR * std)
    agrees = difference <= limit and baseline <= BASELINE[kind] * std and tokens_equal and not faults
    tells = control >= CLEAR * limit
    return GgufVerification(
        difference=difference,
        baseline=baseline,
        control=control,
        logit_std=std,
        argmax_agreement=float((ours.argmax(-1) == reference.argmax(-1)).mean()),
        tokens=len(probe.tokens),
        tokens_equal=tokens_equal,
        faults=faults,
        type=kind,
        passed=(True if tells else None) if agrees else False,
    )


def lost_position(position: GgufPosition) -> GgufPosition:
    """What an engine that misses the method rotates with: plain RoPE at the same base; for plain RoPE, which has
    nothing else to lose, another base.
    """
    is_plain = position.factors is None and not position.scaling and position.attn_factor is None
    base = position.freq_base if not is_plain else (5e5 if position.freq_base == 1e4 else 1e4)
    return GgufPosition(base, None, None, {}, position.dimensions)


def make_plain(directory: Path, plain: Path, base: float) -> None:
    """The same model with plain RoPE at ``base``, its files linked."""
    plain.mkdir()
    for path in directory.iterdir():
        if path.name != "config.json" and path.is_file():
            (plain / path.name).symlink_to(path.resolve())
    content = json.loads((directory / "config.json").read_text())
    entry = {"rope_type": "default", "rope_theta": base}
    present = content["rope_parameters"]
    if "rope_type" not in present:
        content["rope_parameters"] = {**present, "full_attention": {**entry}}
    else:
        kept = {k: v for k, v in present.items() if k == "partial_rotary_factor"}
        content["rope_parameters"] = {**entry, **kept}
    for key in (*OLDER, "rope_local_base_freq", METADATA_KEY):
        content.pop(key, None)
    (plain / "config.json").write_text(json.dumps(content))


def _same_tokens(found: NDArray[np.int64], directory: Path, probe: Probe) -> bool:
    expected = AutoTokenizer.from_pretrained(directory).encode(probe.text, add_special_tokens=False)
    return found.tolist() == expected


def _rms(difference: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(difference.astype(np.float64) ** 2)))
