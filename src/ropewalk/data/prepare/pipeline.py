"""Raw documents to packed stores: tokenizer, held-out documents, and one store for each sequence length."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from ropewalk.config.data import CorpusConfig, PrepareConfig
from ropewalk.config.rules import one_of
from ropewalk.data.prepare.corpus import Document, Unit, sample_documents
from ropewalk.data.prepare.datatrove import run_stages
from ropewalk.data.prepare.domains import domain_rules
from ropewalk.data.prepare.engines import ENGINES
from ropewalk.data.prepare.finish import PREPARED, PREPARING, Report, fill, finish, in_words
from ropewalk.data.prepare.heldout import choose_heldout, write_heldout
from ropewalk.data.prepare.pool import Processes
from ropewalk.data.prepare.sources import Source, corpus_sources, list_units
from ropewalk.data.prepare.stages import (
    PLAN,
    Pack,
    Plan,
    Tokenize,
    open_encoder,
    open_encoders,
    work_directory,
    write_units,
)
from ropewalk.data.prepare.tokenizer import DocumentEncoder, load_tokenizer, train_tokenizer
from ropewalk.data.store.hashing import canonical_json, sha256_text, stable_key
from ropewalk.data.store.manifest import MANIFEST, TOKENIZER
from ropewalk.data.store.reader import PackedStore
from ropewalk.data.store.tokenizer_files import copy_plain, describe_tokenizer, is_plain, sha256_tokenizer
from ropewalk.errors import UserError
from ropewalk.files import write_atomically

PIPELINE = 4  # raise where the same configuration and corpus give other bytes than before
TOKENIZER_SAMPLE_BYTES = 8_000_000  # enough for the merges of a small vocabulary, in seconds
SMALL_BYTES = 16_000_000  # a corpus that is tokenized in less time than processes take to start
STAGES = ("all", "plan", "tokenize", "pack", "finish")

say: Report = partial(print, flush=True)


def prepare(config: PrepareConfig, report: Report = say) -> Path:
    """Write ``tokenizer/``, ``heldout/`` and ``packed-<length>/`` under ``config.output``.

    Finished work of the same configuration and corpus is kept; a killed call goes on with the shards that are missing.
    The same configuration and corpus always give the same bytes, whatever the number of processes or calls. Documents
    are read and tokenized a shard at a time, so memory does not grow with the corpus, but for a few hundred bytes a
    file and the boundaries of documents.

    Args:
        config: what to prepare; ``config.stage`` names a part of it, for arrays of jobs.
        report: takes each line of progress.

    Returns:
        The output directory.

    Raises:
        UserError: for a configuration or corpus that cannot be prepared, or an output that holds other work.
    """
    validate_prepare(config)
    output = Path(config.output)
    if config.stage in ("tokenize", "pack", "finish") and (output / PREPARED).is_file():
        report(f"{output} is finished already")
        return output
    if config.stage in ("tokenize", "pack"):
        plan = Plan.load(output)
        stage = Tokenize(plan) if config.stage == "tokenize" else Pack.of(plan)
        stage.run(config.shard, config.n_shards)
        return output
    if config.stage == "all" and config.executor.kind == "pool":
        _in_pool(config, output, report)
    elif config.stage != "finish" and not _planned(config, output, *_listed(config, report), report):
        pass  # _planned has reported why
    elif config.stage == "all":
        run_stages(output, config.executor)
        if config.executor.kind == "slurm":
            report(f"submitted; {output} is whole when the last job is done")
            return output
    elif config.stage == "finish":
        finish(Plan.load(output), report)
    if config.stage != "plan":
        for line in _table([PackedStore(output / f"packed-{length}") for length in config.sequence_lengths]):
            report(line)
    return output


def _in_pool(config: PrepareConfig, output: Path, report: Report) -> None:
    """All stages, one after the other, in processes of this machine."""
    sources, shards = _listed(config, report)
    streamed = any(source.config.kind == "dataset" and not source.bytes for source in sources)
    small = not streamed and sum(source.bytes for source in sources) < SMALL_BYTES
    with Processes(1 if small and config.workers is None else config.workers) as processes:
        if not _planned(config, output, sources, shards, report, processes):
            return
        plan = Plan.load(output)
        tokenize = Tokenize(plan)
        _run_all(tokenize, "tokenize", processes, report)
        if not all(map(tokenize.finished, range(len(tokenize)))):
            report(f"{tokenize.disproved()} differed on a shard: what it tokenized is done again without it")
            _run_all(tokenize, "tokenize", processes, report)
        _run_all(Pack.of(plan), "pack", processes, report)
    finish(plan, report)


def _listed(config: PrepareConfig, report: Report) -> tuple[list[Source], list[tuple[int, list[Unit]]]]:
    """The sources, and the units of each shard with the place of its source.

    Raises:
        UserError: for a corpus without documents, or one that cannot be read.
    """
    sources = corpus_sources(config.corpus)
    shards = _shards(sources, int(config.shard_mb * 1e6))
    total = sum(source.bytes for source in sources)
    skipped = sum((source.skipped for source in sources), Counter[str]())
    report(f"corpus: {sum(s.units for s in sources):,} units, {total / 1e6:.1f} MB; skipped: {in_words(+skipped)}")
    if not shards:
        raise UserError(
            f"the corpus has no documents (skipped: {dict(+skipped)}); set corpus.stdlib=true, corpus.paths=[...] or "
            "corpus.sources=[...]"
        )
    return sources, shards


def _planned(
    config: PrepareConfig,
    output: Path,
    sources: list[Source],
    shards: list[tuple[int, list[Unit]]],
    report: Report,
    processes: Processes | None = None,
) -> bool:
    """Settle the plan, or find that it is settled; False, and it is said, where all work is finished."""
    work = _work(config, sources)
    if _finished(output, work, config.sequence_lengths):
        report(f"{output} holds this work already; remove it to make it again")
        return False
    _begin(output, work)
    if not (work_directory(output) / PLAN).is_file():
        _make_plan(config, output, sources, shards, report, processes)
    return True


def _shards(sources: Sequence[Source], shard_bytes: int) -> list[tuple[int, list[Unit]]]:
    """The units of all sources, dealt in order to shards of one source and about ``shard_bytes`` each."""
    shards: list[tuple[int, list[Unit]]] = []
    for place, source in enumerate(sources):
        size = 0
        for unit in list_units(source, shard_bytes):
            # Of a share of a streamed dataset no size is known; it may be a whole file of the hub.
            weight = unit.bytes or (shard_bytes if unit.dataset else 1)
            if size == 0 or size + weight > shard_bytes:
                shards.append((place, []))
                size = 0
            shards[-1][1].append(unit)
            size += weight
    return shards


def _make_plan(
    config: PrepareConfig,
    output: Path,
    sources: list[Source],
    shards: list[tuple[int, list[Unit]]],
    report: Report,
    processes: Processes | None,
) -> None:
    """Tokenizer, held-out documents, and what each shard reads."""
    corpus = config.corpus
    documents: list[Document] = []
    if corpus.tokenizer is None or corpus.heldout_documents or corpus.retrieval_tokens:
        documents = sample_documents(_units_of_text(shards))
    ranks = corpus.tokenizer if corpus.tokenizer and Path(corpus.tokenizer).is_dir() else None
    make_encoder = partial(_make_encoder, corpus, config.seed, documents)
    if ranks is not None and is_plain(Path(ranks)):
        copy_plain(Path(ranks), output / TOKENIZER)
        opened = output / TOKENIZER, corpus.engine, Path(ranks), corpus.bos, corpus.eos
        if processes is not None:  # they open it while this one does
            processes.start(len(shards), open_encoder, *opened)
        make_encoder = partial(_copied_encoder, *opened)
    encoder, heldout = choose_heldout(documents, corpus.heldout_documents, corpus.heldout_length, make_encoder)
    if not (output / TOKENIZER).exists():
        encoder.save(output / TOKENIZER)
    tokenizer = describe_tokenizer(output / TOKENIZER)
    report(f"tokenizer: {tokenizer['vocab_size']:,} entries")
    kept_out = [documents[index] for index in heldout]
    if heldout:
        counts = [len(tokens) for tokens in heldout.values()]
        write_heldout(output / "heldout", kept_out, counts, tokenizer["sha256"])
        names = ", ".join(document.name for document in kept_out)
        report(f"held out: {len(heldout)} documents, {sum(counts):,} tokens: {names}")
    rules = domain_rules(corpus)
    for number, (_, units) in enumerate(shards):
        write_units(work_directory(output), number, units)
    template = None if corpus.chat_template is None else Path(corpus.chat_template).read_text(encoding="utf-8")
    plan = Plan(
        output=str(output),
        sources=[{**s.described(), **_date(corpus, s), "skipped": dict(sorted((+s.skipped).items()))} for s in sources],
        shard_sources=[place for place, _ in shards],
        ranks=ranks,
        engine=corpus.engine,
        bos=corpus.bos,
        eos=corpus.eos,
        chat_template=template,
        chat_date=corpus.chat_date,
        heldout=[document.name for document in kept_out],
        rules={name: asdict(rule) for name, rule in rules.items()},
        sequence_lengths=list(config.sequence_lengths),
        vocab_size=tokenizer["vocab_size"],
        seed=config.seed,
        retrieval_tokens=corpus.retrieval_tokens,
    )
    open_encoders(plan)  # an engine or a chat template that cannot be used is named before any work is done
    plan.save()


def _date(corpus: CorpusConfig, source: Source) -> dict[str, str]:
    """The manifest's entry for the date in a source's conversations."""
    return {"chat_date": corpus.chat_date} if corpus.chat_date is not None and source.config.chat else {}


def _units_of_text(shards: Iterable[tuple[int, list[Unit]]]) -> Iterable[Unit]:
    return (unit for _, units in shards for unit in units if not unit.chat)


def _run_all(stage: Tokenize | Pack, name: str, processes: Processes, report: Report) -> None:
    todo = [task for task in range(len(stage)) if not stage.finished(task)]
    report(f"{name}: {len(todo)} shards to do, {len(stage) - len(todo)} finished before")
    todo.sort(key=stage.size, reverse=True)  # a large one begun last would keep one process busy and the others waiting
    for count, (place, _) in enumerate(processes.each(stage.run, [(task, len(stage)) for task in todo]), 1):
        report(f"{name}: shard {todo[place]}, {count} of {len(todo)}")


def _copied_encoder(
    directory: Path, engine: str, ranks: Path, bos: bool, eos: bool, excluded: Collection[int]
) -> DocumentEncoder:
    """The plain tokenizer that was copied to ``directory``."""
    return open_encoder(directory, engine, ranks, bos, eos).unchecked()


def _make_encoder(
    config: CorpusConfig, seed: int, documents: Sequence[Document], excluded: Collection[int]
) -> DocumentEncoder:
    """The tokenizer that is named, else a BPE trained on a sample of the documents that are not excluded."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, config.engine, config.bos, config.eos).unchecked()
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


def validate_prepare(config: PrepareConfig) -> None:
    """Check what can be known of a preparation before the corpus is looked at.

    Raises:
        UserError: naming the value, the rule and the fix.
    """
    lengths = config.sequence_lengths
    if not lengths or min(lengths) < 2 or len(set(lengths)) < len(lengths):
        raise UserError(f"sequence_lengths={lengths} must be different numbers of tokens, each at least 2; correct it")
    for name in ("retrieval_tokens", "heldout_documents"):
        if getattr(config.corpus, name) < 0:
            raise UserError(f"corpus.{name}={getattr(config.corpus, name)} must not be negative; 0 means none")
    if config.corpus.heldout_length < 2:
        raise UserError(f"corpus.heldout_length={config.corpus.heldout_length} must be at least 2 tokens; raise it")
    if not (config.corpus.stdlib or config.corpus.paths or config.corpus.sources):
        raise UserError(
            f"corpus={config.corpus.name} names no documents; set corpus.paths=[DIR] or "
            "'corpus.sources=[{domain: NAME, path: DIR}]'"
        )
    one_of("stage", config.stage, STAGES)
    one_of("corpus.engine", config.corpus.engine, ENGINES)
    one_of("executor.kind", config.executor.kind, ("pool", "local", "slurm"))
    if not 0 <= config.shard < config.n_shards:
        raise UserError(f"shard={config.shard} must be 0 to n_shards - 1 = {config.n_shards - 1}; correct one of them")
    if config.shard_mb <= 0 or (config.workers is not None and config.workers < 1):
        raise UserError(f"shard_mb={config.shard_mb} and workers={config.workers} must be positive; raise them")
    if config.corpus.chat_template is not None and not Path(config.corpus.chat_template).is_file():
        raise UserError(f"corpus.chat_template={config.corpus.chat_template} is not a file; name a Jinja template")
    if config.corpus.chat_date is not None:
        _check_date(config.corpus.chat_date)
    domain_rules(config.corpus)


def _check_date(day: str) -> None:
    try:
        date.fromisoformat(day)
    except ValueError as error:
        raise UserError(f"corpus.chat_date={day} is not a date; write it as 2024-07-26") from error


def _work(config: PrepareConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """The identity of the output: everything that its bytes depend on, without paths and numbers of processes."""
    apart = ("name", "paths", "stdlib", "sources", "chat_template")
    settings = {key: value for key, value in asdict(config.corpus).items() if key not in apart}
    if settings["chat_date"] is None:
        del settings["chat_date"]  # outputs from before there was one are still finished
    tokenizer, template = config.corpus.tokenizer, config.corpus.chat_template
    if tokenizer is not None and Path(tokenizer).is_dir():
        settings["tokenizer"] = sha256_tokenizer(Path(tokenizer))
    if template is not None:
        settings["chat_template"] = sha256_text(Path(template).read_text(encoding="utf-8"))
    content = {
        "pipeline": PIPELINE,
        "seed": config.seed,
        "sequence_lengths": list(config.sequence_lengths),
        "shard_mb": config.shard_mb,
        "corpus": {**settings, "sources": [source.described() for source in sources]},
    }
    return {**content, "sha256": sha256_text(canonical_json(content))}


def _finished(output: Path, work: dict[str, Any], sequence_lengths: Sequence[int]) -> bool:
    path = output / PREPARED
    if not path.exists():
        return False
    done = json.loads(path.read_text(encoding="utf-8"))
    if done["sha256"] != work["sha256"]:
        changed = [key for key in work if key != "sha256" and done.get(key) != work[key]]
        raise UserError(
            f"{output} holds work of another configuration or corpus (differs in: {', '.join(changed)}); "
            "remove it or set output=DIRECTORY"
        )
    for root in (output / f"packed-{length}" for length in sequence_lengths):
        if not (root / MANIFEST).exists():
            raise UserError(f"{root} is gone, though {path} names it; remove {output} and prepare it again")
    return True


def _begin(output: Path, work: dict[str, Any]) -> None:
    """Claim the output directory; what a killed call of other work, or one without a plan yet, left is cleared."""
    claim = output / PREPARING
    if claim.exists():
        same = json.loads(claim.read_text(encoding="utf-8"))["sha256"] == work["sha256"]
        if same and (work_directory(output) / PLAN).is_file():
            return
        for name in (TOKENIZER, "heldout", "work", *(path.name for path in output.glob("packed-*"))):
            if (output / name).exists():
                shutil.rmtree(output / name)
    elif output.exists() and any(output.iterdir()):
        raise UserError(f"{output} has files that are not this command's; remove them or set output=DIRECTORY")
    work_directory(output).mkdir(parents=True, exist_ok=True)
    write_atomically(output / PREPARING, json.dumps(work, indent=2) + "\n")


def _table(stores: Sequence[PackedStore]) -> list[str]:
    lines = [f"{'store':<14}{'domain':<12}{'sequences':>10}{'documents':>11}{'tokens':>14}{'trained':>14}{'fill':>9}"]
    for store in stores:
        for name, info in store.domains.items():
            lines.append(
                f"{store.root.name:<14}{name:<12}{info.sequences:>10,}{info.documents:>11,}{info.tokens:>14,}"
                f"{info.trained_tokens:>14,}{fill(info.tokens, info.padding):>9}"
            )
    return lines
