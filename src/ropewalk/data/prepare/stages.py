"""The two stages that many processes share: raw documents to token files, token files to parts of packed stores.

A stage is a set of numbered tasks; ``run(shard, n_shards)`` does every n_shards-th of them, from number ``shard``, and
leaves out those that are finished. A process pool, an array of jobs and a test all call the same function, and what a
task writes depends on nothing but the plan.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.config.data import DomainConfig
from ropewalk.data.prepare.chat import ChatEncoder
from ropewalk.data.prepare.corpus import Document, Unit, read_documents
from ropewalk.data.prepare.domains import DomainDocuments, pack_domains
from ropewalk.data.prepare.engines import CheckedEngine, FastPathError
from ropewalk.data.prepare.token_files import (
    TokenFileWriter,
    TokenRecord,
    check_whole,
    open_masks,
    open_tokens,
    read_record,
)
from ropewalk.data.prepare.tokenizer import DocumentEncoder, batches, load_tokenizer, open_saved
from ropewalk.data.store.hashing import files_signature
from ropewalk.data.store.manifest import MANIFEST, TOKENIZER
from ropewalk.data.store.part_writer import PartWriter
from ropewalk.data.store.writer import Accounting
from ropewalk.errors import UserError
from ropewalk.files import write_atomically

PLAN = "plan.json"
DISPROVED = "disproved"  # the name of an engine that gave other tokens than its reference
GROUP_TOKENS = 2**26  # packed together: enough for full bins, and 256 MB of tokens


@dataclass(frozen=True)
class Plan:
    """Plan of a preparation, settled before documents are tokenized; the units of each shard lie in files beside it.

    Attributes:
        output: directory of the stores.
        sources: as a manifest describes them, ``masked`` and ``skipped`` files added.
        shard_sources: place in ``sources`` of each shard.
        ranks: directory of the tokenizer's tokenizer.model, where it has one.
        engine: see CorpusConfig.
        bos: begin documents with BOS.
        eos: end them with EOS.
        chat_template: text of it, or None.
        chat_date: that it gets, ISO 8601, or None.
        heldout: names of documents that are left out.
        rules: domain -> how it is packed.
        sequence_lengths: one store each.
        vocab_size: entries of the tokenizer.
        seed: of the order of packed sequences.
        retrieval_tokens: of synthetic retrieval documents, for each sequence length.
    """

    output: str
    sources: list[dict[str, Any]]
    shard_sources: list[int]
    ranks: str | None
    engine: str
    bos: bool
    eos: bool
    chat_template: str | None
    heldout: list[str]
    rules: dict[str, dict[str, str]]
    sequence_lengths: list[int]
    vocab_size: int
    seed: int
    retrieval_tokens: int
    chat_date: str | None = None

    @property
    def work(self) -> Path:
        """Directory of the files that are needed until the stores are whole."""
        return work_directory(Path(self.output))

    @property
    def shards(self) -> int:
        """Number of shards of raw documents."""
        return len(self.shard_sources)

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
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def work_directory(output: Path) -> Path:
    """Directory of intermediate files."""
    return output / "work"


def write_units(work: Path, shard: int, units: list[Unit]) -> None:
    """Say what a shard reads."""
    path = work / f"units-{shard:05d}.json"
    path.write_text(json.dumps([asdict(unit) for unit in units]) + "\n", encoding="utf-8")


def read_units(work: Path, shard: int) -> list[Unit]:
    """Units of a shard."""
    listed = json.loads((work / f"units-{shard:05d}.json").read_text(encoding="utf-8"))
    chosen = [{**unit, "files": tuple(unit["files"])} for unit in listed]
    return [Unit(**{**unit, "dataset": unit["dataset"] and tuple(unit["dataset"])}) for unit in chosen]


@dataclass(frozen=True)
class Tokenize:
    """Raw documents to token files; a task for each shard of the plan."""

    plan: Plan

    def __len__(self) -> int:
        return self.plan.shards

    def finished(self, task: int) -> bool:
        """True if the task is done, and not by an engine that was found to differ since."""
        record = read_record(self.plan.work, task)
        return record is not None and (record.masked or record.engine != self.disproved())

    def size(self, task: int) -> int:
        """Bytes of the shard's documents, where they are known."""
        return sum(unit.bytes for unit in self.plan.units(task))

    def disproved(self) -> str | None:
        """The engine that gave other tokens than its reference on some shard, if one did."""
        path = self.plan.work / DISPROVED
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def run(self, shard: int, n_shards: int) -> None:
        """Do the tasks shard, shard + n_shards, ...; see the module."""
        _run(self, shard, n_shards)

    def task(self, number: int) -> None:
        """Tokenize one shard."""
        encoder, chat = open_encoders(self.plan)
        engine = encoder.engine
        if isinstance(engine, CheckedEngine) and engine.name == self.disproved():
            encoder = encoder.unchecked()
        try:
            self._write(number, encoder, chat)
        except FastPathError as error:
            assert isinstance(engine, CheckedEngine)
            print(
                f"warning: shard {number}: {error}; this shard and all others are done again with "
                f"{engine.reference.name}. Report the text to gigatoken, and set corpus.engine=auto",
                file=sys.stderr,
                flush=True,
            )
            write_atomically(self.plan.work / DISPROVED, engine.name)
            self._write(number, encoder.unchecked(), chat)

    def _write(self, number: int, encoder: DocumentEncoder, chat: ChatEncoder | None) -> None:
        place = self.plan.shard_sources[number]
        source = self.plan.sources[place]
        record = TokenRecord(place, source["domain"], masked=source["chat"], engine=encoder.engine.name)
        skipped: Counter[str] = Counter()
        with TokenFileWriter(self.plan.work, number, record) as file:
            if source["chat"]:
                assert chat is not None
                for document in self._documents(number, skipped):
                    encoded = chat.encode(document.messages, skipped)
                    if encoded is not None:
                        record.text_bytes += sum(len(message["content"].encode()) for message in document.messages)
                        file.write(*encoded)
                        file.end_document()
            else:
                for tokens, ends in encoded_documents(self._counted(number, skipped, record), encoder):
                    file.write(tokens)
                    if ends:
                        file.end_document()
            record.skipped = dict(sorted((+skipped).items()))
            file.commit()

    def _documents(self, number: int, skipped: Counter[str]) -> Iterator[Document]:
        heldout = set(self.plan.heldout)
        for unit in self.plan.units(number):
            for document in read_documents(unit, skipped):
                if document.name in heldout:
                    skipped["held out"] += 1
                else:
                    yield document

    def _counted(self, number: int, skipped: Counter[str], record: TokenRecord) -> Iterator[Document]:
        for document in self._documents(number, skipped):
            record.text_bytes += document.bytes
            yield document


def encoded_documents(documents: Iterator[Document], encoder: DocumentEncoder) -> Iterator[tuple[Any, bool]]:
    """The tokens of documents, a stretch at a time, and whether the document ends with it.

    A few megabytes of text are encoded at once, and no document need be in memory as tokens.

    Raises:
        FastPathError: where the engine is a checked one, and it differs from its reference.
    """
    checked = encoder.engine if isinstance(encoder.engine, CheckedEngine) else None
    last: list[bool] = []  # of each piece under way: whether its document ends with it
    watched: list[bool] = []  # of each piece that is not encoded yet: whether its tokens are to be compared

    def pieces() -> Iterator[str]:
        for place, document in enumerate(documents):
            watch = checked is not None and checked.watch(document.parts, place == 0)
            for part in document.parts:
                for piece in encoder.pieces(part):
                    last.append(False)
                    watched.append(watch)
                    yield piece
            last[-1] = True

    # A batch may end within a document whose last piece is not known yet, so each waits for the next one to begin.
    held: list[Any] = []
    begins = True
    for batch in batches(pieces()):
        encoded = encoder.encode_texts(batch)
        if checked is not None:
            for text, tokens, watch in zip(batch, encoded, watched, strict=True):
                if watch:
                    checked.compare(text.encode(), tokens)
        watched.clear()
        held += encoded
        ready = len(held) - 1
        for tokens, ends in zip(held[:ready], last[:ready], strict=True):
            yield _framed(encoder, tokens, begins, ends), ends
            begins = ends
        del held[:ready], last[:ready]
    for tokens in held:
        yield _framed(encoder, tokens, begins, True), True


def _framed(encoder: DocumentEncoder, tokens: Any, begins: bool, ends: bool) -> Any:
    """A stretch of a document with what begins and ends one; most are neither, and are not copied."""
    if not begins and not ends:
        return tokens
    return np.concatenate([encoder.head if begins else tokens[:0], tokens, encoder.tail if ends else tokens[:0]])


def open_encoder(directory: Path, engine: str, ranks: Path | None, bos: bool, eos: bool) -> DocumentEncoder:
    """See tokenizer.open_saved; opened once a process, as that can take seconds."""
    return _encoder(files_signature(directory), directory, engine, ranks, bos, eos)


@cache
def _encoder(
    signature: object, directory: Path, engine: str, ranks: Path | None, bos: bool, eos: bool
) -> DocumentEncoder:
    return open_saved(directory, engine, ranks, bos, eos)


@cache
def _chat_encoder(directory: Path, template: str | None, today: str | None) -> ChatEncoder:
    day = None if today is None else date.fromisoformat(today)
    return ChatEncoder(load_tokenizer(str(directory), "tokenizers").tokenizer, template, day)


def open_encoders(plan: Plan) -> tuple[DocumentEncoder, ChatEncoder | None]:
    """Encoders of documents, and of conversations if there are any; opened once a process."""
    directory, ranks = Path(plan.output) / TOKENIZER, None if plan.ranks is None else Path(plan.ranks)
    encoder = open_encoder(directory, plan.engine, ranks, plan.bos, plan.eos)
    chat = any(source["chat"] for source in plan.sources)
    return encoder, _chat_encoder(directory, plan.chat_template, plan.chat_date) if chat else None


@dataclass(frozen=True)
class Pack:
    """Token files to parts of packed stores; a task for each group of shards and each sequence length."""

    plan: Plan
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, plan: Plan) -> Pack:
        """Group the shards of a plan, in order, by their tokens.

        Raises:
            UserError: where some are not tokenized yet, or by an engine that was found to differ on another shard.
        """
        records = [read_record(plan.work, shard) for shard in range(plan.shards)]
        tokenize = Tokenize(plan)
        missing = [shard for shard in range(plan.shards) if not tokenize.finished(shard)]
        if missing:
            again = (name := tokenize.disproved()) and f" but by {name}, which differed on a shard"
            raise UserError(
                f"{len(missing)} shards, the first {missing[0]}, are not tokenized{again or ''}; run stage=tokenize"
            )
        groups: dict[int, list[int]] = {}
        for shard, before in enumerate(accumulate((record.tokens for record in records if record), initial=0)):
            if shard < plan.shards:
                groups.setdefault(before // GROUP_TOKENS, []).append(shard)
        return cls(plan, tuple(map(tuple, groups.values())))

    def __len__(self) -> int:
        return len(self.groups) * len(self.plan.sequence_lengths)

    def finished(self, task: int) -> bool:
        """True if the task is done."""
        length, _ = self.place(task)
        return (store_directory(self.plan, length) / MANIFEST).is_file() or self.accounting(task) is not None

    def size(self, task: int) -> int:
        """Tokens of the group."""
        records = (read_record(self.plan.work, shard) for shard in self.groups[self.place(task)[1]])
        return sum(record.tokens for record in records if record is not None)

    def run(self, shard: int, n_shards: int) -> None:
        """Do the tasks shard, shard + n_shards, ...; see the module."""
        _run(self, shard, n_shards)

    def task(self, number: int) -> None:
        """Pack one group into sequences of one length."""
        length, group = self.place(number)
        accounts = {}
        rules = {name: DomainConfig(**rule) for name, rule in self.plan.rules.items()}
        key = (self.plan.seed, *([group] if group else []))
        for name, domain in pack_domains(rules, self._found(group), length, *key).items():
            writer = self.writer(length, name)
            writer.record(group, writer.write(group, domain.sequences))
            accounts[name] = asdict(domain.accounting)
        write_atomically(self._record(number), json.dumps(accounts) + "\n")

    def place(self, task: int) -> tuple[int, int]:
        """The sequence length and the group of a task."""
        which, group = divmod(task, len(self.groups))
        return self.plan.sequence_lengths[which], group

    def writer(self, length: int, domain: str) -> PartWriter:
        """Writes the parts of a domain, one for each group."""
        return PartWriter(store_directory(self.plan, length), domain, length, self.plan.vocab_size)

    def accounting(self, task: int) -> dict[str, Accounting] | None:
        """Accounting of the tokens of a task's domains; None: it is not finished."""
        path = self._record(task)
        length, group = self.place(task)
        if not path.is_file() or any(self.writer(length, name).finished(group) is None for name in self.plan.rules):
            return None
        accounts = json.loads(path.read_text(encoding="utf-8"))
        return {name: Accounting(**account) for name, account in accounts.items()}

    def _record(self, task: int) -> Path:
        length, group = self.place(task)
        return self.plan.work / f"packed-{length}-{group:05d}.json"

    def _found(self, group: int) -> Mapping[str, DomainDocuments]:
        """Documents of the shards of a group, by domain."""
        by_domain: dict[str, list[int]] = {}
        for shard in self.groups[group]:
            check_whole(self.plan.work, shard)
            by_domain.setdefault(self.plan.sources[self.plan.shard_sources[shard]]["domain"], []).append(shard)
        masked = {source["domain"] for source in self.plan.sources if source["chat"]}
        work = self.plan.work
        return {
            name: DomainDocuments(open_tokens(work, shards), open_masks(work, shards) if name in masked else None)
            for name, shards in by_domain.items()
        }


def store_directory(plan: Plan, length: int) -> Path:
    """Of the store of one sequence length."""
    return Path(plan.output) / f"packed-{length}"


def _run(stage: Tokenize | Pack, shard: int, n_shards: int) -> None:
    for number in range(shard, len(stage), n_shards):
        if not stage.finished(number):
            stage.task(number)
