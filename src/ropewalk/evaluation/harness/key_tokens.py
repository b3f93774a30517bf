"""LongPPL (arXiv 2410.23771): the loss over tokens that need long context, chosen once under one reference model.

A token is key if its NLL with a short context exceeds that with the long one by more than 2 nats, and the latter is
below 2 (the paper's section 3). The tokens are kept beside the documents, with the hash of the model that chose them,
and every arm is scored on them. LongPPL is exp of the loss that is reported, nats per key token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ropewalk.config.evaluation import EvaluateConfig, KeyTokensConfig
from ropewalk.errors import UserError
from ropewalk.evaluation.bootstrap import Estimate, ratio
from ropewalk.evaluation.documents import Windows, make_windows, validate_lengths
from ropewalk.evaluation.evaluated_checkpoint import Setting, checkpoint_sha256, open_checkpoint, settings_by_length
from ropewalk.evaluation.model_reader import ModelScorer, Progress, Scorer, chunk_for
from ropewalk.evaluation.results import TOO_FEW
from ropewalk.files import sha256_of_json, write_atomically, writing
from ropewalk.model.load import load_for_evaluation

FILE = "key_tokens.json"
GAIN, MOST = 2.0, 2.0  # nats
SHORT = 4096  # tokens of the paper's short context
FEWEST = 200  # key tokens of a length, below which nothing is reported
LONGPPL = "longppl"  # task


@dataclass(frozen=True)
class KeyTokens:
    """The key tokens of documents.

    Attributes:
        sha256: of the file.
        positions: document -> positions of its key tokens, int64, ascending.
    """

    sha256: str
    positions: dict[str, NDArray[np.int64]]

    def sums(self, document: str, losses: NDArray[np.float32], lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Summed NLL and number of a document's key tokens below each length; ``losses`` of positions 1, 2, ..."""
        positions = self.positions[document]
        for length in lengths:
            within = positions[positions < length]
            nll = float(losses[within - 1].sum(dtype=np.float64))
            yield {"document": document, "context_length": length, "nll": nll, "tokens": within.size}


def choose_key_tokens(scorer: Scorer, ids: torch.Tensor, short: int) -> list[int]:
    """Positions of the key tokens of one document, ascending; none of the first ``short``.

    With the short context a token is predicted from the ``short`` - ``short`` // 4 to ``short`` - 1 tokens before it: a
    pass of ``short`` tokens serves a quarter as many.
    """
    long, step = scorer.token_losses(ids), max(1, short // 4)
    positions: list[int] = []
    for start in range(short, len(ids), step):
        end = min(start + step, len(ids))
        with_short = scorer.token_losses(ids[start + step - short : end])[start - end :]
        with_long = long[start - 1 : end - 1]
        is_key = (with_short - with_long > GAIN) & (with_long < MOST)
        positions += (start + np.flatnonzero(is_key)).tolist()
    return positions


def write_key_tokens(config: KeyTokensConfig) -> Path:
    """Choose the key tokens of ``config.documents`` under ``config.checkpoint``, and write them beside the documents.

    Raises:
        UserError: there is a choice already, documents or model do not fit, or the file cannot be written.
    """
    path = Path(config.documents) / FILE
    if path.exists() and not config.overwrite:
        raise UserError(
            f"{path} is there already, and numbers over other tokens do not compare; overwrite=true replaces"
        )
    if not 0 < config.short < config.length:
        raise UserError(f"short={config.short} must be positive and below length={config.length}")
    validate_lengths([config.length])
    evaluation = EvaluateConfig(
        checkpoint=config.checkpoint, documents=config.documents, lengths=[config.length], device=config.device,
        dtype=config.dtype, max_documents=config.max_documents, paths=config.paths,
    )  # fmt: skip
    checkpoint = open_checkpoint(evaluation)
    windows = make_windows(Path(config.documents), checkpoint.tokenizer, config.length, config.max_documents)
    (setting,) = settings_by_length(checkpoint.position, evaluation.rope, config.test_time, [config.length])
    model = load_for_evaluation(
        checkpoint.directory, extra=setting.extra, length=config.length, dtype=config.dtype, device=config.device
    )
    scorer = ModelScorer(model, prefill_chunk=chunk_for(config.length))
    progress, documents = Progress("key tokens", config.length * len(windows.tokens)), {}
    for name, ids in windows.tokens.items():
        documents[name] = {
            "sha256": sha256_of_json(ids.tolist()),
            "positions": choose_key_tokens(scorer, ids, config.short),
        }
        progress.advance(config.length, f"{name}: {len(documents[name]['positions'])}")
    content = {
        "reference": {
            "checkpoint": str(checkpoint.directory),
            "sha256": checkpoint_sha256(checkpoint.directory),
            "chain": str(setting.chain),
            "dtype": config.dtype,
        },
        "rule": {"short": config.short, "gain": GAIN, "most": MOST},
        "length": config.length,
        "documents": documents,
    }
    with writing(f"documents={config.documents}", Path(config.documents)):
        write_atomically(path, json.dumps(content) + "\n")
    count = sum(len(entry["positions"]) for entry in documents.values())
    print(
        f"{path}: {count} key tokens of {len(documents)} documents"
        + (f", fewer than {FEWEST}" if count < FEWEST else "")
    )
    return path


def read_key_tokens(directory: Path, windows: Windows) -> KeyTokens | None:
    """The key tokens of these windows; None if none were chosen, or for other documents, which is printed.

    Raises:
        UserError: the file is damaged.
    """
    path = directory / FILE
    if not path.is_file():
        if windows.length > SHORT:
            print(
                f"no LongPPL: {path} is not there; choose its tokens once for all arms: python scripts/evaluate.py "
                f"key_tokens checkpoint=BASE documents={directory} length={windows.length}",
                flush=True,
            )
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        chosen = {name: (entry["sha256"], entry["positions"]) for name, entry in content["documents"].items()}
        longest = int(content["length"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); choose the key tokens again") from error
    strange = [n for n, ids in windows.tokens.items() if chosen.get(n, ("",))[0] != sha256_of_json(ids.tolist())]
    if strange:
        print(f"no LongPPL: {path} was chosen for {longest:,} tokens of other documents or tokens than {strange[0]}'s "
              f"{windows.length:,}", flush=True)  # fmt: skip
        return None
    positions = {name: np.array(chosen[name][1], np.int64) for name in windows.tokens}
    return KeyTokens(sha256_of_json(content), positions)


def longppl_rows(sums: Iterable[dict[str, Any]], setting: Setting, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the results table, task ``longppl``: nll in nats per key token, n of them, intervals over documents.

    Fewer than ``FEWEST`` are no number: metric too_few_key_tokens, without a value.

    Args:
        sums: of :meth:`KeyTokens.sums`, of every document.
        setting: the setting.
        seed: of the bootstrap.
    """
    entries = list(sums)
    for length in setting.lengths:
        of_length = [entry for entry in entries if entry["context_length"] == length and entry["tokens"]]
        nll, tokens = ([entry[name] for entry in of_length] for name in ("nll", "tokens"))
        cell = {"task": LONGPPL, "context_length": length}
        if sum(tokens) < FEWEST:
            yield cell | {
                "metric": TOO_FEW,
                **Estimate(math.nan, math.nan, math.nan, math.nan, 0).columns(),
            }
        else:
            yield cell | {"metric": "nll", **ratio(nll, tokens, seed).columns(), "n": sum(tokens)}
