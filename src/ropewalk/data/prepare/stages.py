"""The stages of a preparation: documents to token files, these to parts of packed stores, and stores of the parts.

Many processes share the first two. Each is a set of numbered tasks; ``run(shard, n_shards)`` does every n_shards-th of
them, from number ``shard``, and leaves out those that are finished. A process pool, an array of jobs and a test all
call the same function, and what a task writes depends on nothing but the plan. ``finish`` is for one process.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ropewalk.config.data import DomainConfig
from ropewalk.data.prepare.chat import ChatEncoder
from ropewalk.data.prepare.corpus import Document, read_documents
from ropewalk.data.prepare.engines import CheckedEngine, FastPathError
from ropewalk.data.prepare.packing import RETRIEVAL, DomainDocuments, pack_domains
from ropewalk.data.prepare.prepare_plan import Plan, Report, open_encoders, sample_documents
from ropewalk.data.prepare.retrieval import retrieval_documents
from ropewalk.data.prepare.token_files import (
    BadRow,
    FlatDocuments,
    Skipped,
    TokenFileWriter,
    TokenRecord,
    check_whole,
    open_masks,
    open_tokens,
    read_record,
)
from ropewalk.data.prepare.tokenizer import DocumentEncoder, encoded_documents
from ropewalk.data.store.describe import fill
from ropewalk.data.store.manifest import MANIFEST, TOKENIZER
from ropewalk.data.store.reader import PackedStore
from ropewalk.data.store.tokenizer_files import copy_tokenizer
from ropewalk.data.store.writer import PartWriter, clear_records, commit_store
from ropewalk.errors import UserError
from ropewalk.files import fsync_path, write_atomically

DISPROVED = "disproved"  # the name of an engine that gave other tokens than its reference
GROUP_TOKENS = 2**26  # packed together: enough for full bins, and 256 MB of tokens
PREPARED = "prepared.json"  # names finished work
PREPARING = "preparing.json"  # names work that is under way, or was when it was killed


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
        index = self.plan.shard_sources[number]
        source = self.plan.sources[index]
        record = TokenRecord(index, source["domain"], masked=source["chat"], engine=encoder.engine.name)
        skipped = Skipped(self.plan.config.corpus.bad_rows == "error")
        with TokenFileWriter(self.plan.work, number, record) as file:
            if source["chat"]:
                assert chat is not None
                self._write_chats(number, file, record, skipped, chat)
            else:
                for tokens, ends in encoded_documents(self._counted(number, skipped, record), encoder):
                    file.write(tokens)
                    if ends:
                        file.end_document()
            record.skipped, record.first = dict(sorted((+skipped).items())), skipped.first
            file.commit()

    def _write_chats(
        self, number: int, file: TokenFileWriter, record: TokenRecord, skipped: Skipped, chat: ChatEncoder
    ) -> None:
        chat.unused.clear()
        unread = Counter[str]()
        for document in self._documents(number, skipped):
            try:
                encoded = chat.encode(document.messages, document.tools)
            except BadRow as bad:
                skipped.leave_out(bad, document.name)
                continue
            record.text_bytes += sum(len(message["content"].encode()) for message in document.messages)
            unread.update(document.unread)
            file.write(*encoded)
            file.end_document()
        record.unused, record.unread = (dict(sorted(fields.items())) for fields in (chat.unused, unread))

    def _documents(self, number: int, skipped: Skipped) -> Iterator[Document]:
        heldout = set(self.plan.heldout)
        for unit in self.plan.units(number):
            for document in read_documents(unit, skipped):
                if document.name in heldout:
                    skipped["held out"] += 1
                else:
                    yield document

    def _counted(self, number: int, skipped: Skipped, record: TokenRecord) -> Iterator[Document]:
        for document in self._documents(number, skipped):
            record.text_bytes += document.bytes
            yield document


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
        for shard, first_token in enumerate(accumulate((record.tokens for record in records if record), initial=0)):
            if shard < plan.shards:
                groups.setdefault(first_token // GROUP_TOKENS, []).append(shard)
        return cls(plan, tuple(map(tuple, groups.values())))

    def __len__(self) -> int:
        return len(self.groups) * len(self.plan.config.sequence_lengths)

    def finished(self, task: int) -> bool:
        """True if the task is done."""
        length, group = self.length_and_group(task)
        return (self.plan.store(length) / MANIFEST).is_file() or all(
            self.writer(length, name).finished(group) for name in self.plan.rules
        )

    def size(self, task: int) -> int:
        """Tokens of the group."""
        records = (read_record(self.plan.work, shard) for shard in self.groups[self.length_and_group(task)[1]])
        return sum(record.tokens for record in records if record is not None)

    def run(self, shard: int, n_shards: int) -> None:
        """Do the tasks shard, shard + n_shards, ...; see the module."""
        _run(self, shard, n_shards)

    def task(self, number: int) -> None:
        """Pack one group into sequences of one length."""
        length, group = self.length_and_group(number)
        key = (self.plan.config.seed, *([group] if group else []))
        for name, domain in pack_domains(self.plan.rules, self._documents(group), length, *key).items():
            writer = self.writer(length, name)
            writer.record(group, writer.write(group, domain.sequences), domain.accounting)

    def length_and_group(self, task: int) -> tuple[int, int]:
        """The sequence length and the group of a task."""
        index, group = divmod(task, len(self.groups))
        return self.plan.config.sequence_lengths[index], group

    def writer(self, length: int, domain: str) -> PartWriter:
        """Writes the parts of a domain, one for each group."""
        return PartWriter(self.plan.store(length), domain, length, self.plan.vocab_size)

    def _documents(self, group: int) -> Mapping[str, DomainDocuments]:
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


def _run(stage: Tokenize | Pack, shard: int, n_shards: int) -> None:
    for number in range(shard, len(stage), n_shards):
        if not stage.finished(number):
            stage.task(number)


def finish(plan: Plan, report: Report) -> None:
    """Put the parts together, and clear away what was needed for them."""
    output, pack = plan.output, Pack.of(plan)
    records = [record for shard in range(plan.shards) if (record := read_record(plan.work, shard)) is not None]
    sources = _described(plan, records)
    engines = Counter(record.engine for record in records)
    report(f"tokenized with {', '.join(f'{name} ({count} shards)' for name, count in sorted(engines.items()))}")
    for index, source in enumerate(sources):
        _report_source(source, [record for record in records if record.source == index], report)
    special_tokens = _special_tokens(plan, sources)
    if special_tokens["eos_left_off"]:
        report(f"the tokenizer's own EOS is left off {special_tokens['eos_left_off']:,} documents")
    filler: list[Document] = []
    if plan.config.corpus.retrieval_tokens:
        units = (unit for shard in range(plan.shards) for unit in plan.units(shard) if not unit.chat)
        filler = [document for document in sample_documents(units) if document.name not in set(plan.heldout)]
    for length in plan.config.sequence_lengths:
        if not (plan.store(length) / MANIFEST).is_file():
            _assemble(plan, pack, length, filler, sources, special_tokens, report)
        _clear(plan, length)
    (output / PREPARING).replace(output / PREPARED)
    fsync_path(output)
    shutil.rmtree(plan.work)


def _report_source(source: dict[str, Any], records: list[TokenRecord], report: Report) -> None:
    name, skipped = source["name"], in_words(source["skipped"])
    report(f"{name}: {source['documents']:,} documents, {source['tokens']:,} tokens, skipped: {skipped}")
    first = {reason: where for record in reversed(records) for reason, where in record.first.items()}
    for reason, where in sorted(first.items()):
        report(f"{name}: first skipped as {reason!r}: {where}")
    if unused := sum((Counter(record.unused) for record in records), Counter[str]()):
        report(f"{name}: fields of messages that the chat template does not use: {in_words(unused)}")
    if unread := sum((Counter(record.unread) for record in records), Counter[str]()):
        report(f"{name}: columns of conversations that are not read: {in_words(unread)}")


def _described(plan: Plan, records: list[TokenRecord]) -> list[dict[str, Any]]:
    """The sources with what was read of them."""
    described = [{**source, "documents": 0, "text_bytes": 0, "tokens": 0} for source in plan.sources]
    for record in records:
        source = described[record.source]
        for key in ("documents", "text_bytes", "tokens"):
            source[key] += getattr(record, key)
        source["skipped"] = dict(sorted((Counter(source["skipped"]) + Counter(record.skipped)).items()))
    return described


def _special_tokens(plan: Plan, sources: list[dict[str, Any]]) -> dict[str, Any]:
    """See Manifest; conversations begin and end as their template has it."""
    encoder, _ = open_encoders(plan)
    has_eos = bool(len(encoder.tail))
    without_eos = (source["documents"] for source in sources if source["chat"] or not has_eos)
    return {"bos": bool(len(encoder.head)), "eos": has_eos, "eos_left_off": sum(without_eos) if plan.adds_eos else 0}


def _assemble(
    plan: Plan,
    pack: Pack,
    length: int,
    filler: list[Document],
    sources: list[dict[str, Any]],
    special_tokens: dict[str, Any],
    report: Report,
) -> None:
    root = plan.store(length)
    domains, accounts = {}, {}
    for name in plan.rules:
        domains[name], accounts[name] = pack.writer(length, name).assemble_recorded(len(pack.groups))
    if filler:
        writer = pack.writer(length, RETRIEVAL)
        encoder, _ = open_encoders(plan)
        texts = [part for document in filler for part in document.parts]
        corpus = plan.config.corpus
        documents, masks = zip(
            *retrieval_documents(
                encoder.unchecked(),
                texts,
                length,
                corpus.retrieval_tokens,
                plan.config.seed,
                named=corpus.retrieval_names,
            ),
            strict=True,
        )
        domain_documents = {
            RETRIEVAL: DomainDocuments(
                FlatDocuments.of(documents), None if corpus.retrieval_names else FlatDocuments.of(masks)
            )
        }
        packed = pack_domains({RETRIEVAL: DomainConfig()}, domain_documents, length, plan.config.seed)[RETRIEVAL]
        domains[RETRIEVAL] = writer.assemble([writer.write(0, packed.sequences)])
        accounts[RETRIEVAL] = packed.accounting
    for name in [name for name, info in domains.items() if not info.sequences]:
        report(f"{root.name}: no document for the domain {name}; left out")
        del domains[name]
    tokenizer = copy_tokenizer(plan.output / TOKENIZER, root / TOKENIZER)
    store = commit_store(root, length, tokenizer, domains, accounts, sources, special_tokens)
    for name, info in store.domains.items():
        report(
            f"{root.name}: {name}: {info.sequences:,} sequences, fill {fill(info)}, "
            f"moved: {in_words(accounts[name].moved)}, dropped: {in_words(accounts[name].dropped)}"
        )


def _clear(plan: Plan, length: int) -> None:
    """Remove from a store what its manifest does not name; before there is one, a killed call needs it again."""
    store = PackedStore(plan.store(length))
    for name in (*plan.rules, RETRIEVAL):
        if name in store.domains:
            clear_records(store.root / name)
        elif (store.root / name).exists():
            shutil.rmtree(store.root / name)


def in_words(counts: dict[str, int]) -> str:
    """Counts by name, as text."""
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number) or "none"
