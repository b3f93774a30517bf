"""The last stage of a preparation: parts of packed stores put together, and what was needed for them removed."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ropewalk.config.data import DomainConfig
from ropewalk.data.prepare.corpus import Document, sample_documents
from ropewalk.data.prepare.domains import RETRIEVAL, DomainDocuments, pack_domains
from ropewalk.data.prepare.retrieval import retrieval_documents
from ropewalk.data.prepare.stages import Pack, Plan, open_encoders, store_directory
from ropewalk.data.prepare.token_files import FlatDocuments, read_record
from ropewalk.data.store.manifest import MANIFEST, TOKENIZER
from ropewalk.data.store.part_writer import clear_records
from ropewalk.data.store.reader import PackedStore
from ropewalk.data.store.writer import Accounting, commit_store, copy_tokenizer
from ropewalk.errors import UserError
from ropewalk.files import fsync_path

PREPARED = "prepared.json"  # names finished work
PREPARING = "preparing.json"  # names work that is under way, or was when it was killed

Report = Callable[[str], None]


def finish(plan: Plan, report: Report) -> None:
    """Put the parts together, and clear away what was needed for them."""
    output, pack = Path(plan.output), Pack.of(plan)
    sources = _described(plan)
    records = [read_record(plan.work, shard) for shard in range(plan.shards)]
    engines = Counter(record.engine for record in records if record is not None)
    report(f"tokenized with {', '.join(f'{name} ({count} shards)' for name, count in sorted(engines.items()))}")
    for source in sources:
        report(f"{source['name']}: {source['documents']:,} documents, {source['tokens']:,} tokens, skipped: "
               f"{in_words(source['skipped'])}")  # fmt: skip
    filler: list[Document] = []
    if plan.retrieval_tokens:
        units = (unit for shard in range(plan.shards) for unit in plan.units(shard) if not unit.chat)
        filler = [document for document in sample_documents(units) if document.name not in set(plan.heldout)]
    for length in plan.sequence_lengths:
        if not (store_directory(plan, length) / MANIFEST).is_file():
            _assemble(plan, pack, length, filler, sources, report)
        _clear(plan, length)
    (output / PREPARING).replace(output / PREPARED)
    fsync_path(output)
    shutil.rmtree(plan.work)


def _described(plan: Plan) -> list[dict[str, Any]]:
    """The sources with what was read of them."""
    described = [{**source, "documents": 0, "text_bytes": 0, "tokens": 0} for source in plan.sources]
    for shard in range(plan.shards):
        record = read_record(plan.work, shard)
        assert record is not None
        source = described[record.source]
        for key in ("documents", "text_bytes", "tokens"):
            source[key] += getattr(record, key)
        source["skipped"] = dict(sorted((Counter(source["skipped"]) + Counter(record.skipped)).items()))
    return described


def _assemble(
    plan: Plan,
    pack: Pack,
    length: int,
    filler: list[Document],
    sources: list[dict[str, Any]],
    report: Report,
) -> None:
    root = store_directory(plan, length)
    tasks = [task for task in range(len(pack)) if pack.place(task)[0] == length]
    accounts: dict[str, Accounting] = dict.fromkeys(plan.rules, Accounting(0))
    for task in tasks:
        done = pack.accounting(task)
        if done is None:
            raise UserError(f"group {pack.place(task)[1]} of packed-{length} is not packed; run stage=pack")
        accounts = {name: account + done[name] for name, account in accounts.items()}
    domains = {}
    for name in plan.rules:
        writer = pack.writer(length, name)
        parts = [writer.finished(pack.place(task)[1]) for task in tasks]
        domains[name] = writer.assemble([part for part in parts if part is not None])
    if filler:
        writer = pack.writer(length, RETRIEVAL)
        encoder, _ = open_encoders(plan)
        texts = [part for document in filler for part in document.parts]
        made = list(retrieval_documents(encoder.unchecked(), texts, length, plan.retrieval_tokens, plan.seed))
        found = {RETRIEVAL: DomainDocuments(FlatDocuments.of(made))}
        packed = pack_domains({RETRIEVAL: DomainConfig()}, found, length, plan.seed)[RETRIEVAL]
        domains[RETRIEVAL] = writer.assemble([writer.write(0, packed.sequences)])
        accounts[RETRIEVAL] = packed.accounting
    for name in [name for name, info in domains.items() if not info.sequences]:
        report(f"{root.name}: no document for the domain {name}; left out")
        del domains[name]
    tokenizer = copy_tokenizer(Path(plan.output) / TOKENIZER, root / TOKENIZER)
    store = commit_store(root, length, tokenizer, domains, accounts, sources)
    for name, info in store.domains.items():
        report(
            f"{root.name}: {name}: {info.sequences:,} sequences, fill {fill(info.tokens, info.padding)}, "
            f"moved: {in_words(accounts[name].moved)}, dropped: {in_words(accounts[name].dropped)}"
        )


def _clear(plan: Plan, length: int) -> None:
    """Remove from a store what its manifest does not name; before there is one, a killed call needs it again."""
    store = PackedStore(store_directory(plan, length))
    for name in (*plan.rules, RETRIEVAL):
        if name in store.domains:
            clear_records(store.root / name)
        elif (store.root / name).exists():
            shutil.rmtree(store.root / name)


def fill(tokens: int, padding: int) -> str:
    """Share of a store's tokens that are not padding, as text."""
    return f"{tokens / (tokens + padding):.2%}"


def in_words(counts: dict[str, int]) -> str:
    """Counts by name, as text."""
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number) or "none"
