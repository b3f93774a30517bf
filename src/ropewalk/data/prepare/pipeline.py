"""Raw documents to packed stores: tokenizer, held-out documents, and one store for each sequence length."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ropewalk.config.data import CorpusConfig, PrepareConfig
from ropewalk.config.rules import one_of
from ropewalk.data.prepare.chat import read_template
from ropewalk.data.prepare.datatrove import run_stages
from ropewalk.data.prepare.engines import ENGINES
from ropewalk.data.prepare.packing import domain_rules
from ropewalk.data.prepare.prepare_plan import (
    PLAN,
    Plan,
    Report,
    local_tokenizer,
    make_plan,
    open_encoder,
    work_directory,
)
from ropewalk.data.prepare.sources import Source, corpus_sources, deal_shards
from ropewalk.data.prepare.stages import PREPARED, PREPARING, Pack, Tokenize, finish, in_words
from ropewalk.data.store.describe import domain_table, next_commands
from ropewalk.data.store.hashing import canonical_json, sha256_text
from ropewalk.data.store.manifest import MANIFEST, TOKENIZER
from ropewalk.data.store.reader import PackedStore
from ropewalk.data.store.tokenizer_files import adds_bos, bos_mode, is_plain, open_tokenizer, sha256_tokenizer
from ropewalk.errors import UserError
from ropewalk.files import OWNER, bytes_of, is_in_use, only_writer, read_object, write_atomically, writing

PIPELINE = 4  # raise where the same configuration and corpus give other bytes than before
SMALL_BYTES = 16_000_000  # a corpus that is tokenized in less time than processes take to start
STAGES = ("all", "plan", "tokenize", "pack", "finish")

Result = TypeVar("Result")

log: Report = partial(print, flush=True)


def prepare(config: PrepareConfig, report: Report = log) -> Path:
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
    output, name = Path(config.output), f"output={config.output}"
    if config.stage in ("tokenize", "pack", "finish") and (output / PREPARED).is_file():
        report(f"{output} is finished already")
        return output
    with writing(name, output, partial(bytes_to_write, config)):
        if config.stage in ("tokenize", "pack"):
            plan = Plan.load(output)
            share = f"{config.stage}-{config.shard}-of-{config.n_shards}"
            with only_writer(plan.work, f"{name}, {share}", f"{share}-{OWNER}"):
                (Tokenize(plan) if config.stage == "tokenize" else Pack.of(plan)).run(config.shard, config.n_shards)
            return output
        if config.stage == "finish":
            plan = Plan.load(output)
            with only_writer(output, name):
                finish(plan, report)
        else:
            _run(config, report)
    if config.stage == "all" and config.executor.kind == "slurm":
        report(f"submitted; {output} is whole when the last job is done")
    elif config.stage != "plan":
        stores = [PackedStore(output / f"packed-{length}") for length in config.sequence_lengths]
        for line in (*domain_table(stores), *next_commands(stores, output)):
            report(line)
    return output


def bytes_to_write(config: PrepareConfig) -> int:
    """Tokens of local sources, of four bytes and about as many as their text has, as token files and in each store."""
    paths = [*config.corpus.paths, *(source.path for source in config.corpus.sources)]
    return sum(bytes_of(Path(path)) for path in paths) * (1 + len(config.sequence_lengths))


def _run(config: PrepareConfig, report: Report) -> None:
    """Make the plan and, with stage=all, have it done; nothing where all work was finished before.

    Raises:
        UserError: for a corpus without documents, or one that cannot be read; an output that holds other work, or that
            another process writes.
    """
    output = Path(config.output)
    sources = corpus_sources(config.corpus, output)
    shards = deal_shards(sources, int(config.shard_mb * 1e6))
    total = sum(source.bytes for source in sources)
    skipped = sum((source.skipped for source in sources), Counter[str]())
    report(f"corpus: {sum(s.units for s in sources):,} units, {total / 1e6:.1f} MB; skipped: {in_words(+skipped)}")
    if not shards:
        raise UserError(
            f"the corpus has no documents (skipped: {dict(+skipped)}); set corpus.stdlib=true, corpus.paths=[...] or "
            "corpus.sources=[...]"
        )
    work = _work(config, sources)
    if _finished(output, work, config.sequence_lengths):
        report(f"{output} holds this work already; remove it to make it again")
        return
    in_pool = config.stage == "all" and config.executor.kind == "pool"
    streamed = any(source.config.kind == "dataset" and not source.bytes for source in sources)
    small = config.workers is None and not streamed and total < SMALL_BYTES
    with (
        only_writer(output, f"output={output}"),
        Processes(1 if small or not in_pool else config.workers) as processes,
    ):
        if _finished(output, work, config.sequence_lengths):
            report(f"{output} was finished by another process meanwhile")
            return
        _begin(output, work)
        if not (work_directory(output) / PLAN).is_file():
            make_plan(config, sources, shards, report, partial(processes.start, len(shards)))
        if in_pool:
            _run_in(processes, Plan.load(output), report)
        elif config.stage == "all":
            run_stages(output, config.executor)


def _run_in(processes: Processes, plan: Plan, report: Report) -> None:
    """The stages after the plan, one after the other."""
    tokenize = Tokenize(plan)
    _run_all(tokenize, "tokenize", processes, report)
    if not all(map(tokenize.finished, range(len(tokenize)))):
        report(f"{tokenize.disproved()} differed on a shard: what it tokenized is done again without it")
        _run_all(tokenize, "tokenize", processes, report)
    _run_all(Pack.of(plan), "pack", processes, report)
    finish(plan, report)


def _run_all(stage: Tokenize | Pack, name: str, processes: Processes, report: Report) -> None:
    todo = [task for task in range(len(stage)) if not stage.finished(task)]
    report(f"{name}: {len(todo)} shards to do, {len(stage) - len(todo)} finished before")
    todo.sort(key=stage.size, reverse=True)  # a large one begun last would keep one process busy and the others waiting
    for count, (index, _) in enumerate(processes.each(stage.run, [(task, len(stage)) for task in todo]), 1):
        report(f"{name}: shard {todo[index]}, {count} of {len(todo)}")


class Processes:
    """Processes of this machine for independent calls, started as calls need them.

    Args:
        workers: most processes; None: one for each core that this process may use. With one, calls run in this process.
    """

    def __init__(self, workers: int | None) -> None:
        self._workers = workers or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._pool is None:
            return
        if kind is not None and not issubclass(kind, Exception):  # Ctrl-C or SIGTERM: a shard may take minutes more
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def start(self, calls: int, function: Callable[..., object], *arguments: Any) -> None:
        """Start the processes that ``calls`` calls will need, with a first call that prepares each of them.

        An error of that call is raised again by the calls that need its result.
        """
        for _ in range(min(self._workers, calls) if self._workers > 1 and calls > 1 else 0):
            self._executor().submit(_without_result, function, *arguments)

    def each(self, function: Callable[..., Result], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Result]]:
        """The index and the result of ``function(*call)`` for each call, in the order in which they finish.

        Args:
            function: of a module, so that a process can import it.
            calls: arguments, begun in this order.

        Raises:
            Exception: the first that a call raised. Then, or when the caller stops, calls that have not begun are left.
        """
        if self._workers == 1 or len(calls) == 1:
            yield from ((index, function(*call)) for index, call in enumerate(calls))
            return
        executor = self._executor()
        futures = {executor.submit(function, *call): index for index, call in enumerate(calls)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()

    def _executor(self) -> ProcessPoolExecutor:
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")  # a fork would inherit the locks of other threads
            self._pool = ProcessPoolExecutor(self._workers, spawn, initializer=_begin_process)
        return self._pool


def _without_result(function: Callable[..., object], *arguments: Any) -> None:
    function(*arguments)


def _begin_process() -> None:
    """One thread in a process, as there is one for each core; it leaves Ctrl-C to its parent and ends with it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # it was killed: nobody takes the results, and a process of a pool waits for ever


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
    one_of("corpus.bad_rows", config.corpus.bad_rows, ("skip", "error"))
    bos_mode(config.corpus.bos)
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
    excluded = ("name", "paths", "stdlib", "sources", "chat_template")
    settings = {key: value for key, value in asdict(config.corpus).items() if key not in excluded}
    if settings["chat_date"] is None:
        del settings["chat_date"]  # outputs from before there was one are still finished
    for name in ("column", "bad_rows"):  # of the sources' digests, and of what is an error
        del settings[name]
    tokenizer, template = config.corpus.tokenizer, config.corpus.chat_template
    if tokenizer is not None and Path(tokenizer).is_dir():
        settings["tokenizer"] = sha256_tokenizer(Path(tokenizer))
    settings["bos"] = _begins_with_bos(config.corpus)
    if template is not None:
        settings["chat_template"] = sha256_text(read_template(template))
    content = {
        "pipeline": PIPELINE,
        "seed": config.seed,
        "sequence_lengths": list(config.sequence_lengths),
        "shard_mb": config.shard_mb,
        "corpus": {**settings, "sources": [source.described() for source in sources]},
    }
    return {**content, "sha256": sha256_text(canonical_json(content))}


def _begins_with_bos(corpus: CorpusConfig) -> bool | str:
    """True or False, as outputs of before there were three modes have it; ``auto`` where only the hub knows."""
    mode, directory = bos_mode(corpus.bos), local_tokenizer(corpus)
    if mode != "auto" or corpus.tokenizer is None:
        return mode != "never"
    if directory is None:
        return mode
    if not is_plain(directory):
        return adds_bos(open_tokenizer(directory, "corpus.tokenizer"))
    return len(open_encoder(directory, "tokenizers", None, mode, corpus.eos).head) > 0


def _finished(output: Path, work: dict[str, Any], sequence_lengths: Sequence[int]) -> bool:
    path = output / PREPARED
    if not path.exists():
        return False
    prepared = read_object(path)
    if prepared.get("sha256") != work["sha256"]:
        changed = [key for key in work if key != "sha256" and prepared.get(key) != work[key]]
        raise UserError(
            f"{output} holds work of another configuration or corpus (differs in: {', '.join(changed)}); "
            "remove it or set output=DIRECTORY"
        )
    for root in (output / f"packed-{length}" for length in sequence_lengths):
        if not (root / MANIFEST).exists():
            raise UserError(f"{root} is gone, though {path} names it; remove {output} and prepare it again")
    return True


def _begin(output: Path, work: dict[str, Any]) -> None:
    """Mark the output as this work's; what a killed call of other work, or one without a plan yet, left is cleared."""
    claim = output / PREPARING
    if claim.exists():
        same = read_object(claim).get("sha256") == work["sha256"]
        if same and (work_directory(output) / PLAN).is_file():
            return
        for name in (TOKENIZER, "heldout", "work", *(path.name for path in output.glob("packed-*"))):
            if (output / name).exists():
                shutil.rmtree(output / name)
    elif is_in_use(output):
        raise UserError(f"{output} has files that are not this command's; remove them or set output=DIRECTORY")
    work_directory(output).mkdir(parents=True, exist_ok=True)
    write_atomically(output / PREPARING, json.dumps(work, indent=2) + "\n")
