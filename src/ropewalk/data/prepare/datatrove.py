"""Preparation on many machines: datatrove's executors, readers and deduplication (extra scale).

``run_stages`` runs the stages of prepare.py under datatrove's executors. ``gather`` reads what prepare.py does not read
itself (WARC), or should not read in one go (a hub dataset of many files), takes near duplicates out, and leaves JSON
lines that prepare.py takes as a source of kind files.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from ropewalk.config.data import ExecutorConfig, GatherConfig
from ropewalk.config.rules import one_of
from ropewalk.data.prepare.prepare_plan import Plan
from ropewalk.data.prepare.stages import Pack, Tokenize, finish
from ropewalk.errors import UserError
from ropewalk.files import only_writer, write_atomically, writing

EXECUTORS = ("local", "slurm")
READERS = ("hub", "warc", "jsonl", "parquet")
GATHERED = "gathered.json"
DOCUMENTS = "documents"


def require_datatrove() -> None:
    """Say what is missing.

    Raises:
        UserError: where datatrove is not installed.
    """
    try:
        import datatrove  # noqa: F401
    except ImportError as error:
        raise UserError("datatrove is not installed; pip install 'ropewalk[scale]'") from error


def executor(config: ExecutorConfig, steps: list[Any], tasks: int, logs: Path, depends: Any = None) -> Any:
    """One of datatrove's executors for a pipeline of ``steps``, after that of ``depends``.

    Args:
        config: which one.
        steps: datatrove's, or functions of (data, rank, world_size).
        tasks: that the steps are divided into.
        logs: directory of its log files and of its marks of finished tasks.
        depends: the executor that must have run before.

    Raises:
        UserError: for an executor that is not known, or one of SLURM without a partition and a time.
    """
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    one_of("executor.kind", config.kind, EXECUTORS)
    if config.kind == "local":
        workers = min(config.workers or len(os.sched_getaffinity(0)), tasks)
        return LocalPipelineExecutor(steps, tasks, workers, logging_dir=str(logs), depends=depends)
    if config.partition is None or config.time is None:
        raise UserError("executor.kind=slurm needs executor.partition and executor.time; set both")
    return SlurmPipelineExecutor(
        steps, tasks, time=config.time, partition=config.partition, workers=config.workers or -1,
        job_name=f"ropewalk-{logs.name}", logging_dir=str(logs), depends=depends, env_command=config.env_command,
        mem_per_cpu_gb=config.mem_per_cpu_gb, mail_type="NONE",
    )  # fmt: skip


def run_stages(output: Path, config: ExecutorConfig) -> None:
    """Tokenize, pack and finish what is planned in ``output``; on SLURM, submit that.

    Raises:
        UserError: for an output without a plan, or an executor that cannot be used.
    """
    require_datatrove()
    Plan.load(output)
    logs = output.with_name(output.name + "-logs")
    last = None
    for name, tasks in (("tokenize", config.tasks), ("pack", config.tasks), ("finish", 1)):
        # The stages know what is finished; datatrove's own marks would outlive an output that was removed.
        last = executor(config, [partial(_run_stage, str(output), name)], tasks, logs / name, last)
        last.skip_completed = False
    assert last is not None
    last.run()


def _run_stage(output: str, name: str, data: object = None, rank: int = 0, world_size: int = 1) -> None:
    """A stage as a step of a pipeline."""
    plan = Plan.load(Path(output))
    if name == "finish":
        finish(plan, print)
    else:
        (Tokenize(plan) if name == "tokenize" else Pack.of(plan)).run(rank, world_size)


def gather(config: GatherConfig) -> Path:
    """Read documents, take near duplicates out, and write them as JSON lines.

    Near duplicates are what datatrove's MinHash holds for such, with its usual 14 buckets of 8 hashes of 5-grams of
    words; one of each cluster stays. What was read, left out and written is counted, step by step, in gathered.json;
    on SLURM, the jobs are submitted and nothing is counted here.

    Returns:
        The directory of the documents: the path of a source of kind files.

    Raises:
        UserError: for a reader that is not known, or an executor that cannot be used.
    """
    require_datatrove()
    from datatrove.pipeline.writers import JsonlWriter

    output = Path(config.output)
    logs, documents = output / "logs", output / DOCUMENTS
    if (output / GATHERED).is_file():
        print(f"{output} is gathered already; remove it to do it again", flush=True)
        return documents
    with writing(f"output={output}", output), only_writer(output, f"output={output}"):
        run_with = partial(executor, config.executor)
        tasks, writer = config.executor.tasks, JsonlWriter(str(documents), "${rank}.jsonl", compression=None)
        if not config.minhash:
            last = run_with([*_read(config), writer], tasks, logs / "read")
        else:
            raw = output / "read"
            first = run_with([*_read(config), JsonlWriter(str(raw), "${rank}.jsonl", None)], tasks, logs / "read")
            last = _deduplicated(run_with, raw, output / "minhash", writer, tasks, logs, first)
        last.run()
        if config.executor.kind == "local":
            counts = {path.parent.name: _counts(path) for path in sorted(logs.glob("*/stats.json"))}
            for stage, steps in counts.items():
                for step, numbers in steps.items():
                    print(f"{stage}: {step}: {', '.join(f'{number:,} {name}' for name, number in numbers.items())}")
            write_atomically(output / GATHERED, json.dumps(counts, indent=2, ensure_ascii=False) + "\n")
    return documents


def _read(config: GatherConfig) -> list[Any]:
    """The steps that read documents."""
    from datatrove.pipeline import readers
    from datatrove.pipeline.extractors import Trafilatura

    one_of("reader", config.reader, READERS)
    if config.reader == "hub":
        if config.revision is None and not Path(config.path).exists():
            raise UserError(
                f"path={config.path} is a hub dataset without a revision; give its commit, so that the same "
                "configuration is the same data"
            )
        options = {"name": config.subset, "split": config.split, "revision": config.revision}
        chosen = {key: value for key, value in options.items() if value is not None}
        return [readers.HuggingFaceDatasetReader(config.path, chosen, streaming=True, text_key=config.column)]
    if not Path(config.path).exists() and "://" not in config.path:
        raise UserError(f"path={config.path} does not exist; correct it")
    if config.reader == "warc":
        return [readers.WarcReader(config.path, glob_pattern=config.glob), Trafilatura(timeout=config.extract_seconds)]
    reader = {"jsonl": readers.JsonlReader, "parquet": readers.ParquetReader}[config.reader]
    return [reader(config.path, glob_pattern=config.glob, text_key=config.column)]


def _deduplicated(run_with: Any, raw: Path, work: Path, writer: Any, tasks: int, logs: Path, first: Any) -> Any:
    """The executors of MinHash deduplication: signatures, buckets, clusters, and the filter that writes."""
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader

    minhash = MinhashConfig()
    signatures, buckets, removed = (str(work / name) for name in ("signatures", "buckets", "removed"))
    sign = MinhashDedupSignature(signatures, minhash)
    # One task for each file, so that the filter meets documents in the order in which they were signed.
    second = run_with([JsonlReader(str(raw)), sign], tasks, logs / "signatures", first)
    compare = MinhashDedupBuckets(signatures, buckets, config=minhash)
    third = run_with([compare], minhash.num_buckets, logs / "buckets", second)
    fourth = run_with([MinhashDedupCluster(buckets, removed, minhash)], 1, logs / "clusters", third)
    return run_with([JsonlReader(str(raw)), MinhashDedupFilter(removed), writer], tasks, logs / "filter", fourth)


def _counts(stats: Path) -> dict[str, dict[str, int]]:
    """Documents that came into a step, went on, or did not, as datatrove counted them."""
    counted = {}
    for step in json.loads(stats.read_text(encoding="utf-8")):
        numbers = {name: value for name, value in step["stats"].items() if isinstance(value, int)}
        totals = {
            name: v["total"] for name, v in step["stats"].items() if isinstance(v, dict) and v.get("unit") == "doc"
        }
        name = step["name"].encode("ascii", "ignore").decode().strip(" -:")
        counted[name] = {**numbers, **totals}
    return counted
