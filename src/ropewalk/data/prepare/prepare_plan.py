"""Plan of a preparation: the tokenizer, the held-out documents, and what each shard reads."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.config.data import CorpusConfig, DomainConfig, ExecutorConfig, PrepareConfig, SourceConfig
from ropewalk.config.groups import PathsConfig
from ropewalk.data.prepare.chat import ChatEncoder, read_template
from ropewalk.data.prepare.corpus import Document, Unit, read_documents
from ropewalk.data.prepare.packing import domain_rules
from ropewalk.data.prepare.sources import Source, read_units, write_units
from ropewalk.data.prepare.token_files import Skipped
from ropewalk.data.prepare.tokenizer import DocumentEncoder, load_tokenizer, train_tokenizer
from ropewalk.data.store.hashing import files_signature, stable_key
from ropewalk.data.store.manifest import TOKENIZER
from ropewalk.data.store.tokenizer_files import (
    adds_eos,
    check_carries,
    copy_plain,
    describe_tokenizer,
    is_plain,
    open_tokenizer,
    set_chat_template,
)
from ropewalk.errors import UserError
from ropewalk.files import fsync_path, read_object, sha256_of, write_atomically

PLAN = "plan-2.json"  # plan.json was of another form: what was under way is begun again
TOKENIZER_SAMPLE_BYTES = 8_000_000  # enough for the merges of a small vocabulary, in seconds
SAMPLE_SHARDS, SAMPLE_CHARACTERS = 16, 10_000  # whose tokens are decoded and compared
MANY_ROWS = 10  # none of which can be used: an error of the configuration
SAMPLE_BYTES = 2**27  # of text, held in memory; a smaller corpus is taken whole
PREFERRED_TOKENS = 65_536  # longer documents are taken last: training needs them most
BYTES_PER_TOKEN = 4  # for guessing which documents are long enough; counted afterwards

Report = Callable[[str], None]  # takes a line of progress
Shards = Sequence[tuple[int, list[Unit]]]  # the index of a shard's source, and its units


@dataclass(frozen=True)
class Plan:
    """Plan of a preparation, settled before documents are tokenized; the units of each shard lie in files beside it.

    Attributes:
        config: of the preparation.
        sources: as a manifest describes them, ``skipped`` files added.
        shard_sources: index in ``sources`` of each shard's.
        chat_template: text of it, or None.
        heldout: names of documents that are left out.
        vocab_size: entries of the tokenizer.
        adds_eos: whether the tokenizer's own encode, as it was given, ends with EOS.
    """

    config: PrepareConfig
    sources: list[dict[str, Any]]
    shard_sources: list[int]
    chat_template: str | None
    heldout: list[str]
    vocab_size: int
    adds_eos: bool = False

    @property
    def output(self) -> Path:
        """Directory of the stores."""
        return Path(self.config.output)

    @property
    def rules(self) -> dict[str, DomainConfig]:
        """How each domain is packed."""
        return domain_rules(self.config.corpus)

    @property
    def work(self) -> Path:
        """Directory of the files that are needed until the stores are whole."""
        return work_directory(self.output)

    @property
    def shards(self) -> int:
        """Number of shards of raw documents."""
        return len(self.shard_sources)

    def store(self, length: int) -> Path:
        """Directory of the store of one sequence length."""
        return self.output / f"packed-{length}"

    def units(self, shard: int) -> list[Unit]:
        """Units of a shard."""
        return read_units(self.work, shard)

    def save(self) -> None:
        """Write the plan; the files of units are there already."""
        write_atomically(self.work / PLAN, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, output: Path) -> Plan:
        """The plan of an output.

        Raises:
            UserError: where there is none.
        """
        path = work_directory(output) / PLAN
        if not path.is_file():
            raise UserError(f"{output} has no plan; run stage=plan first")
        content = read_object(path)
        config: dict[str, Any] = content.pop("config")
        corpus, executor, paths = (config.pop(name) for name in ("corpus", "executor", "paths"))
        corpus["sources"] = [SourceConfig(**source) for source in corpus["sources"]]
        corpus["domains"] = {name: DomainConfig(**rule) for name, rule in corpus["domains"].items()}
        groups: dict[str, Any] = {
            "corpus": CorpusConfig(**corpus),
            "executor": ExecutorConfig(**executor),
            "paths": PathsConfig(**paths),
        }
        return cls(PrepareConfig(**config, **groups), **content)


def work_directory(output: Path) -> Path:
    """Directory of intermediate files."""
    return output / "work"


def make_plan(
    config: PrepareConfig, sources: Sequence[Source], shards: Shards, report: Report, warm_up: Callable[..., None]
) -> None:
    """Write the tokenizer, the held-out documents, the units of each shard and, last, the plan.

    Args:
        config: of the preparation.
        sources: of the corpus.
        shards: of all sources.
        report: takes each line of progress.
        warm_up: called with a function and its arguments that a process will need, as soon as they are known.
    """
    corpus, output = config.corpus, Path(config.output)
    template = None if corpus.chat_template is None else read_template(corpus.chat_template)
    documents: list[Document] = []
    if corpus.tokenizer is None or corpus.heldout_documents or corpus.retrieval_tokens:
        documents = sample_documents(unit for _, units in shards for unit in units if not unit.chat)
    directory = local_tokenizer(corpus)
    if directory is not None and is_plain(directory):
        copy_plain(directory, output / TOKENIZER)
        set_chat_template(output / TOKENIZER, template)
        settings = output / TOKENIZER, corpus.engine, directory, corpus.bos, corpus.eos
        own = open_encoder(*settings)
        own_eos = adds_eos(own.tokenizer)
        own.mark(output / TOKENIZER)
        warm_up(open_encoder, *settings)
        encoder, heldout = choose_heldout(documents, corpus, lambda excluded: open_encoder(*settings).unchecked())
    else:
        make_encoder = partial(_make_encoder, corpus, config.seed, documents)
        encoder, heldout = choose_heldout(documents, corpus, make_encoder)
        own_eos = adds_eos(encoder.tokenizer)
        encoder.save(output / TOKENIZER)
        set_chat_template(output / TOKENIZER, template)
    tokenizer = describe_tokenizer(output / TOKENIZER)
    begin = "begin with BOS" if len(encoder.head) else "begin without BOS"
    report(f"tokenizer: {tokenizer['vocab_size']:,} entries; documents {begin}")
    check_carries(encoder.tokenizer.backend_tokenizer, _texts(shards), f"corpus.tokenizer={corpus.tokenizer}")
    kept_out = [documents[index] for index in heldout]
    if heldout:
        counts = [len(tokens) for tokens in heldout.values()]
        write_heldout(output / "heldout", kept_out, counts, tokenizer["sha256"])
        names = ", ".join(document.name for document in kept_out)
        report(f"held out: {len(heldout)} documents, {sum(counts):,} tokens: {names}")
    for number, (_, units) in enumerate(shards):
        write_units(work_directory(output), number, units)
    plan = Plan(
        config,
        sources=[_described(source, corpus) for source in sources],
        shard_sources=[index for index, _ in shards],
        chat_template=template,
        heldout=[document.name for document in kept_out],
        vocab_size=tokenizer["vocab_size"],
        adds_eos=own_eos,
    )
    open_encoders(plan)  # an engine or a chat template that cannot be used is named before any work is done
    plan.save()


def sample_documents(units: Iterable[Unit]) -> list[Document]:
    """Documents in corpus order: those whose names hash lowest, until they have 128 MB together.

    What they are does not depend on the order in which the corpus is read.
    """
    chosen: list[tuple[int, int, int, Document]] = []  # a heap, the highest hash first
    size = 0
    skipped = Skipped()  # counted where the corpus is tokenized
    index = 0
    for unit in units:
        for document in read_documents(unit, skipped):
            heapq.heappush(chosen, (-stable_key("sample", document.name), -index, document.bytes, document))
            index += 1
            size += document.bytes
            while size - chosen[0][2] >= SAMPLE_BYTES:
                size -= heapq.heappop(chosen)[2]
    return [document for _, _, _, document in sorted(chosen, key=lambda entry: -entry[1])]


def _texts(shards: Shards) -> Iterator[str]:
    """The beginning of the first document of some shards on this machine.

    Raises:
        UserError: where rows were read and none of them can be used, as with a wrong column.
    """
    sampled = {index: units[0] for index, units in reversed(shards)}  # the first of each source, and some others
    others = [units[0] for _, units in shards[:: max(1, len(shards) // SAMPLE_SHARDS)]]
    for unit in [*sampled.values(), *others]:
        if unit.dataset is not None and not Path(unit.root).exists():
            continue
        skipped = Skipped()
        document = next(read_documents(unit, skipped), None)
        if document is not None:
            yield (document.text or "".join(message["content"] for message in document.messages))[:SAMPLE_CHARACTERS]
        elif sum(skipped.values()) >= MANY_ROWS and skipped.first:
            reason, where = next(iter(skipped.first.items()))
            raise UserError(
                f"no row of {unit.root} can be used: {reason} ({where}); set column= of the source, or corpus.column, "
                "to the column with the documents"
            )


def _described(source: Source, corpus: CorpusConfig) -> dict[str, Any]:
    """The manifest's entry for a source, and the files that were left out."""
    date_in_chats = {"chat_date": corpus.chat_date} if corpus.chat_date is not None and source.config.chat else {}
    return {**source.described(), **date_in_chats, "skipped": dict(sorted((+source.skipped).items()))}


def _make_encoder(
    corpus: CorpusConfig, seed: int, documents: Sequence[Document], excluded: Collection[int]
) -> DocumentEncoder:
    """The tokenizer that is named, else a BPE trained on a sample of the documents that are not excluded."""
    if corpus.tokenizer is not None:
        return load_tokenizer(corpus.tokenizer, corpus.engine, corpus.bos, corpus.eos).unchecked()
    left_out = set(excluded)
    parts = [
        (stable_key("sample", seed, document.name, number), part)
        for index, document in enumerate(documents)
        if index not in left_out
        for number, part in enumerate(document.parts)
    ]
    sample, size = [], 0
    for _, part in sorted(parts):
        if size >= TOKENIZER_SAMPLE_BYTES:
            break
        sample.append(part)
        size += len(part.encode())
    return train_tokenizer(sample, corpus.vocab_size)


def choose_heldout(
    documents: Sequence[Document], corpus: CorpusConfig, make_encoder: Callable[[Collection[int]], DocumentEncoder]
) -> tuple[DocumentEncoder, dict[int, NDArray[np.uint32]]]:
    """The tokenizer, and the held-out documents, which had no part in it.

    The tokenizer is needed to count tokens and must not see what it counts, so documents of a likely size
    are set aside first, in the order of a stable hash of their names; where too few prove long enough, more
    are set aside and the tokenizer is made again.

    Args:
        documents: of the corpus.
        corpus: its ``heldout_documents`` of at least ``heldout_length`` tokens each, BOS and EOS included, are chosen.
        make_encoder: makes the tokenizer without the documents of the given indices.

    Returns:
        The tokenizer, and index -> tokens of the documents held out.

    Raises:
        UserError: where the corpus has too few such documents.
    """
    count, length = corpus.heldout_documents, corpus.heldout_length
    if count == 0:
        return make_encoder(()), {}
    candidates = sorted(
        (index for index, document in enumerate(documents) if document.bytes >= length),
        key=lambda index: _preference(documents[index], length),
    )
    limit = min(len(candidates), len(documents) - 1)  # something must be left to train on
    aside = min(count, limit)
    while True:
        encoder = make_encoder(candidates[:aside])
        encoded = encoder.encode_documents([documents[index].parts for index in candidates[:aside]])
        enough = {i: tokens for i, tokens in zip(candidates, encoded, strict=False) if len(tokens) >= length}
        if len(enough) >= count:
            return encoder, dict(list(enough.items())[:count])
        if aside == limit:
            raise UserError(
                f"corpus.heldout_documents={count}, but of {len(documents)} documents, one of which is left to train "
                f"on, only {len(enough)} have corpus.heldout_length={length} tokens; lower one or add documents"
            )
        aside = min(2 * aside, limit)


def _preference(document: Document, length: int) -> tuple[bool, int]:
    likely = BYTES_PER_TOKEN * length <= document.bytes < BYTES_PER_TOKEN * PREFERRED_TOKENS
    return not likely, stable_key("heldout", document.name)


def write_heldout(directory: Path, documents: Sequence[Document], tokens: Sequence[int], tokenizer_sha256: str) -> None:
    """Write ``documents.jsonl`` (name, text) and, last, ``manifest.json`` with counts and the file's SHA-256.

    Args:
        directory: made if needed.
        documents: what was held out.
        tokens: of each document, BOS and EOS included.
        tokenizer_sha256: of the tokenizer that counted them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "documents.jsonl"
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            file.write(json.dumps({"name": document.name, "text": document.text}, ensure_ascii=False) + "\n")
    fsync_path(path)
    manifest = {
        "format": "ropewalk-heldout",
        "version": 1,
        "sha256": sha256_of(path),
        "tokenizer_sha256": tokenizer_sha256,
        "documents": [
            {"name": document.name, "bytes": document.bytes, "tokens": count}
            for document, count in zip(documents, tokens, strict=True)
        ],
    }
    write_atomically(directory / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def open_encoder(directory: Path, engine: str, ranks: Path | None, bos: str, eos: bool) -> DocumentEncoder:
    """See load_tokenizer; opened once a process, as that can take seconds."""
    return _encoder(files_signature(directory), directory, engine, ranks, bos, eos)


@cache
def _encoder(
    signature: object, directory: Path, engine: str, ranks: Path | None, bos: str, eos: bool
) -> DocumentEncoder:
    return load_tokenizer(directory, engine, bos, eos, ranks=ranks, saved=True)


@cache
def _chat_encoder(directory: Path, template: str | None, today: str | None) -> ChatEncoder:
    day = None if today is None else date.fromisoformat(today)
    return ChatEncoder(open_tokenizer(directory), template, day)


def open_encoders(plan: Plan) -> tuple[DocumentEncoder, ChatEncoder | None]:
    """Encoders of documents, and of conversations if there are any; opened once a process."""
    directory, corpus = plan.output / TOKENIZER, plan.config.corpus
    encoder = open_encoder(directory, corpus.engine, local_tokenizer(corpus), corpus.bos, corpus.eos)
    chat = any(source["chat"] for source in plan.sources)
    return encoder, _chat_encoder(directory, plan.chat_template, corpus.chat_date) if chat else None


def local_tokenizer(corpus: CorpusConfig) -> Path | None:
    """``corpus.tokenizer`` where it is a directory, not a hub id."""
    return Path(corpus.tokenizer) if corpus.tokenizer and Path(corpus.tokenizer).is_dir() else None
