"""Raw documents to packed stores: tokenizer, held-out documents, and one store for each sequence length."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ropewalk.config import CorpusConfig, PrepareConfig
from ropewalk.data.corpus import Corpus, Document, load_corpus
from ropewalk.data.domains import DomainSource, corpus_domains, packed_domain
from ropewalk.data.hashing import canonical_json, sha256_directory, sha256_text, stable_key
from ropewalk.data.heldout import choose_heldout, write_heldout
from ropewalk.data.manifest import MANIFEST
from ropewalk.data.retrieval import retrieval_documents
from ropewalk.data.store import PackedStore
from ropewalk.data.tokenizer import DocumentEncoder, describe_tokenizer, load_tokenizer, train_tokenizer
from ropewalk.data.writer import write_store
from ropewalk.files import fsync_path, write_atomically

PIPELINE = 1  # raise where the same configuration and corpus give other bytes than before
PREPARED = "prepared.json"  # names finished work
PREPARING = "preparing.json"  # names work that is under way, or was when it was killed
TOKENIZER_SAMPLE_BYTES = 8_000_000  # enough for the merges of a small vocabulary, in seconds

Report = Callable[[str], None]
say: Report = partial(print, flush=True)


def prepare(config: PrepareConfig, report: Report = say) -> Path:
    """Write ``tokenizer/``, ``heldout/`` and ``packed-<length>/`` under ``config.output``.

    Finished work of the same configuration and corpus is kept; what a killed call left is done again. The
    same configuration and corpus always give the same bytes.

    Args:
        config: what to prepare.
        report: takes each line of progress.

    Returns:
        The output directory.

    Raises:
        ValueError: for a configuration or corpus that cannot be prepared, or an output that holds other work.
    """
    _validate(config)
    output = Path(config.output)
    corpus = load_corpus(config.corpus.stdlib, config.corpus.paths)
    report(
        f"corpus: {len(corpus.documents):,} documents, {_megabytes(corpus.documents):.1f} MB; "
        f"skipped: {_counts(+corpus.skipped)}"
    )
    work = _work(config, corpus)
    if _finished(output, work, config.sequence_lengths):
        report(f"{output} holds this work already; remove it to make it again")
    else:
        _begin(output, work)
        _write(config, corpus, output, report)
        (output / PREPARING).replace(output / PREPARED)
        fsync_path(output)
    for line in _table([PackedStore(output / f"packed-{length}") for length in config.sequence_lengths]):
        report(line)
    return output


def _write(config: PrepareConfig, corpus: Corpus, output: Path, report: Report) -> None:
    encoder, heldout = choose_heldout(
        corpus.documents,
        config.corpus.heldout_documents,
        config.corpus.heldout_length,
        partial(_make_encoder, config.corpus, config.seed, corpus.documents),
    )
    encoder.save(output / "tokenizer")
    tokenizer = describe_tokenizer(output / "tokenizer")
    report(f"tokenizer: {tokenizer['vocab_size']:,} entries")
    if heldout:
        kept_out = [corpus.documents[index] for index in heldout]
        counts = [len(tokens) for tokens in heldout.values()]
        write_heldout(output / "heldout", kept_out, counts, tokenizer["sha256"])
        names = ", ".join(document.name for document in kept_out)
        report(f"held out: {len(heldout)} documents, {sum(counts):,} tokens: {names}")
    training = [document for index, document in enumerate(corpus.documents) if index not in heldout]
    tokens = encoder.encode_documents([document.parts for document in training])
    total = sum(map(len, tokens))
    report(
        f"tokens: {total:,} in {len(training):,} documents, {1e6 * _megabytes(training) / total:.2f} bytes per token"
    )
    for length in config.sequence_lengths:
        enough = sum(len(document) >= length for document in tokens)
        report(f"packed-{length}: {enough:,} of {len(tokens):,} documents have {length:,} tokens or more")
        domains = corpus_domains(tokens, length, config.seed)
        if config.corpus.retrieval_tokens:
            filler = [part for document in training for part in document.parts]
            made = list(retrieval_documents(encoder, filler, length, config.corpus.retrieval_tokens, config.seed))
            domains["retrieval"] = packed_domain("retrieval", made, length, config.seed)
        _write_packed(output / f"packed-{length}", length, domains, output / "tokenizer", report)


def _write_packed(root: Path, length: int, domains: dict[str, DomainSource], tokenizer: Path, report: Report) -> None:
    """Write one store, leaving out and reporting the domains without a token."""
    empty = [name for name, domain in domains.items() if domain.tokens == 0]
    store = write_store(
        root,
        length,
        {name: domain.sequences for name, domain in domains.items() if name not in empty},
        tokenizer,
        {name: domain.accounting for name, domain in domains.items() if name not in empty},
    )
    for name in empty:
        report(f"{root.name}: no document for the domain {name}; left out")
    for name, info in store.domains.items():
        accounting = domains[name].accounting
        report(
            f"{root.name}: {name}: {info.sequences:,} sequences, fill {_fill(info.tokens, info.padding)}, "
            f"moved: {_counts(accounting.moved)}, dropped: {_counts(accounting.dropped)}"
        )


def _make_encoder(
    config: CorpusConfig, seed: int, documents: Sequence[Document], excluded: Collection[int]
) -> DocumentEncoder:
    """The tokenizer that is named, else a BPE trained on a sample of the documents that are not excluded."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    parts = [
        (stable_key("sample", seed, document.name, number), part)
        for index, document in enumerate(documents)
        if index not in set(excluded)
        for number, part in enumerate(document.parts)
    ]
    sample, size = [], 0
    for _, part in sorted(parts):
        if size >= TOKENIZER_SAMPLE_BYTES:
            break
        sample.append(part)
        size += len(part.encode())
    return train_tokenizer(sample, config.vocab_size)


def _validate(config: PrepareConfig) -> None:
    lengths = config.sequence_lengths
    if not lengths or min(lengths) < 2 or len(set(lengths)) < len(lengths):
        raise ValueError(f"sequence_lengths={lengths} must be different numbers of tokens, each at least 2; correct it")
    for name in ("retrieval_tokens", "heldout_documents"):
        if getattr(config.corpus, name) < 0:
            raise ValueError(f"corpus.{name}={getattr(config.corpus, name)} must not be negative; 0 means none")
    if config.corpus.heldout_length < 2:
        raise ValueError(f"corpus.heldout_length={config.corpus.heldout_length} must be at least 2 tokens; raise it")


def _work(config: PrepareConfig, corpus: Corpus) -> dict[str, Any]:
    """What the output depends on; where its files lie is no part of it."""
    settings = {key: value for key, value in asdict(config.corpus).items() if key not in ("name", "paths", "stdlib")}
    tokenizer = config.corpus.tokenizer
    if tokenizer is not None and Path(tokenizer).is_dir():
        settings["tokenizer"] = sha256_directory(Path(tokenizer))
    content = {
        "pipeline": PIPELINE,
        "seed": config.seed,
        "sequence_lengths": list(config.sequence_lengths),
        "corpus": {
            **settings,
            "documents": len(corpus.documents),
            "skipped": dict(sorted((+corpus.skipped).items())),
            "sha256": corpus.sha256,
        },
    }
    return {**content, "sha256": sha256_text(canonical_json(content))}


def _finished(output: Path, work: dict[str, Any], sequence_lengths: Sequence[int]) -> bool:
    path = output / PREPARED
    if not path.exists():
        return False
    done = json.loads(path.read_text(encoding="utf-8"))
    if done["sha256"] != work["sha256"]:
        changed = [key for key in work if key != "sha256" and done.get(key) != work[key]]
        raise ValueError(
            f"{output} holds work of another configuration or corpus (differs in: {', '.join(changed)}); "
            "remove it or set output=DIRECTORY"
        )
    for root in (output / f"packed-{length}" for length in sequence_lengths):
        if not (root / MANIFEST).exists():
            raise ValueError(f"{root} is gone, though {path} names it; remove {output} and prepare it again")
    return True


def _begin(output: Path, work: dict[str, Any]) -> None:
    """Claim the output directory; clear what a killed call left there."""
    if (output / PREPARING).exists():
        for name in ("tokenizer", "heldout", *(path.name for path in output.glob("packed-*"))):
            if (output / name).exists():
                shutil.rmtree(output / name)
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} has files that are not this command's; remove them or set output=DIRECTORY")
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / PREPARING, json.dumps(work, indent=2) + "\n")


def _table(stores: Sequence[PackedStore]) -> list[str]:
    lines = [f"{'store':<14}{'domain':<12}{'sequences':>10}{'documents':>11}{'tokens':>14}{'trained':>14}{'fill':>9}"]
    for store in stores:
        for name, info in store.domains.items():
            lines.append(
                f"{store.root.name:<14}{name:<12}{info.sequences:>10,}{info.documents:>11,}{info.tokens:>14,}"
                f"{info.trained_tokens:>14,}{_fill(info.tokens, info.padding):>9}"
            )
    return lines


def _fill(tokens: int, padding: int) -> str:
    return f"{tokens / (tokens + padding):.2%}"


def _megabytes(documents: Sequence[Document]) -> float:
    return sum(document.bytes for document in documents) / 1e6


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number) or "none"
