"""Verification by llama.cpp: a GGUF file's logits against stock transformers' on the directory it was made from."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.store.tokenizer_files import open_tokenizer
from ropewalk.export.gguf.gguf_file import gguf_type, write_gguf
from ropewalk.export.gguf.gguf_model import GgufPosition
from ropewalk.export.output import Finding, Unverifiable, judged
from ropewalk.export.portable import OLDER
from ropewalk.export.verify.check_export import Claim, gguf_faults
from ropewalk.export.verify.probing import llama_logits, read_passage, stock_logits
from ropewalk.model.hf_directory import read_config
from ropewalk.rope.log_temperature import CARRIER, LogTemperature
from ropewalk.rope.position import METADATA_KEY

MAX_TOKENS = 2048
RATIO = 1.5  # of the plain-RoPE baseline, that the method's difference may reach
CLEAR = 1.5  # times that limit, which the control must pass to count as failing clearly
FLOOR = 1e-5  # of the logits' standard deviation: a baseline below it is rounding
# Of the logits' standard deviation: how far two engines that agree on everything may be apart. llama.cpp rounds the
# activations of every product to the file's type as well.
BASELINE = {"f32": 1e-3, "f16": 0.02, "bf16": 0.1, "q8_0": 0.2}


def verify_gguf(directory: Path, path: Path, wanted: str | None, tokens: int | None = None) -> Finding:
    """Compare a GGUF file with the directory that it was made from; see :func:`judge`.

    Args:
        directory: Hugging Face directory.
        path: the file.
        wanted: its type; None: that of the directory.
        tokens: of the text, at most MAX_TOKENS; None: as many.

    Raises:
        Unverifiable: where llama.cpp is not installed, or there is no tokenizer to read text with.
        RuntimeError: where an engine cannot run its files.
    """
    if importlib.util.find_spec("cyllama") is None:
        raise Unverifiable("not verified: cyllama is not installed (pip install --no-deps cyllama==0.2.18)")
    claim = Claim.of(directory)
    faults = claim.faults() + gguf_faults(path, claim.gguf)
    passage = read_passage(directory, min(tokens or MAX_TOKENS, MAX_TOKENS))
    lost = lost_position(claim.gguf)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".verification-") as scratch:
        plain_file, plain_directory = Path(scratch) / "plain.gguf", Path(scratch) / "plain"
        write_gguf(directory, plain_file, wanted, instead=lost)
        make_plain(directory, plain_directory, lost.freq_base)
        compiled = directory
        if claim.position.depends_on_length and not claim.has_metadata:  # the file holds it at one length
            compiled = Path(scratch) / "compiled"
            make_linked(directory, compiled, claim.position.rope_parameters(claim.config.max_position_embeddings))
        reference, plain = (answer["logits"] for answer in stock_logits([compiled, plain_directory], passage))
        llama, llama_plain = llama_logits([path, plain_file], passage)
    own_tokens = open_tokenizer(directory).encode(passage.text, add_special_tokens=False)
    return judge(
        reference,
        plain,
        llama["logits"],
        llama_plain["logits"],
        kind=gguf_type(wanted, claim.config),
        tokens=len(passage.tokens),
        tokens_equal=llama["tokens"].tolist() == own_tokens,
        faults=faults,
    )


def engine_name(path: Path) -> str:
    """The name of llama.cpp on this file among the findings."""
    return f"llama.cpp {path.name}"


def judge(
    reference: NDArray[np.float32],
    plain: NDArray[np.float32],
    llama: NDArray[np.float32],
    llama_plain: NDArray[np.float32],
    *,
    kind: str,
    tokens: int,
    tokens_equal: bool,
    faults: list[str],
) -> Finding:
    """The finding on logits (rows, vocabulary) of transformers and llama.cpp, with the method and under plain RoPE.

    Args:
        reference: transformers with the method.
        plain: transformers with plain RoPE.
        llama: llama.cpp with the method.
        llama_plain: llama.cpp with plain RoPE.
        kind: type of the file's matrices.
        tokens: length of the text.
        tokens_equal: whether llama.cpp cuts the text into the same tokens.
        faults: of the static verification.

    Returns:
        passed where the engines agree; None where losing the method would show no difference either, so that the
        comparison cannot tell. Its numbers, differences being root mean squares over all logits:

        - difference: llama.cpp against transformers, both with the method.
        - baseline: the same two engines, both with plain RoPE and the same weights.
        - control: llama.cpp with plain RoPE against transformers with the method: what a lost method looks like.
        - logit_std: standard deviation of transformers' logits.
        - argmax_agreement: share of positions where both engines choose the same token.
        - tokens, tokens_equal, type.
    """
    std = float(reference.std())
    difference, baseline, control = _rms(llama - reference), _rms(llama_plain - plain), _rms(llama_plain - reference)
    limit = RATIO * max(baseline, FLOOR * std)
    agrees = difference <= limit and baseline <= BASELINE[kind] * std and tokens_equal
    tells = control >= CLEAR * limit
    agreement = float((llama.argmax(-1) == reference.argmax(-1)).mean())
    return judged(
        (True if tells else None) if agrees else False,
        f"llama.cpp on the {kind} file differs by {difference:.2e} from transformers, where plain RoPE differs by "
        f"{baseline:.2e} and the method lost by {control:.2e} (logits' standard deviation {std:.3f}, {tokens:,} "
        f"tokens, arg-max agrees at {agreement:.1%}); {'the same tokens' if tokens_equal else 'OTHER TOKENS'}",
        faults,
        difference=difference,
        baseline=baseline,
        control=control,
        logit_std=std,
        argmax_agreement=agreement,
        tokens=tokens,
        tokens_equal=tokens_equal,
        type=kind,
    )


def lost_position(position: GgufPosition) -> GgufPosition:
    """Rotation of an engine that misses the method: plain RoPE at the same base; for plain RoPE, which has
    nothing else to lose, another base.
    """
    is_plain = position.factors is None and not position.scaling and position.attn_factor is None
    base = position.freq_base if not is_plain else (5e5 if position.freq_base == 1e4 else 1e4)
    return GgufPosition(base, None, None, {}, position.dimensions)


def make_plain(directory: Path, plain: Path, base: float) -> None:
    """The same model with plain RoPE at ``base``, no query scaled, its files linked."""
    config = read_config(directory)
    still = {} if config.model_type != CARRIER else LogTemperature(0.0, 1).stock_keys()  # it fails without the keys
    make_linked(directory, plain, {"rope_type": "default", "rope_theta": base, **still})


def make_linked(directory: Path, target: Path, entry: dict[str, Any]) -> None:
    """The same model with another stock entry, its files linked."""
    target.mkdir()
    for path in directory.iterdir():
        if path.name != "config.json" and path.is_file():
            (target / path.name).symlink_to(path.resolve())
    content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    present = content["rope_parameters"]
    if "rope_type" not in present:
        content["rope_parameters"] = {**present, "full_attention": {**entry}}
    else:
        kept = {k: v for k, v in present.items() if k == "partial_rotary_factor"}
        content["rope_parameters"] = {**entry, **kept}
    for key in (*OLDER, "rope_local_base_freq", METADATA_KEY):
        content.pop(key, None)
    (target / "config.json").write_text(json.dumps(content), encoding="utf-8")


def _rms(difference: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(difference.astype(np.float64) ** 2)))
