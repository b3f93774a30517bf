"""Sources of a corpus: listed as units, which are dealt to shards and written down for the stages."""

from __future__ import annotations

import errno
import json
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import xxhash

from ropewalk.config.data import CorpusConfig, SourceConfig
from ropewalk.config.rules import one_of
from ropewalk.data.prepare.corpus import (
    CODE,
    JSONL,
    PROSE,
    Unit,
    compression,
    datasets_errors,
    open_dataset,
    open_parquet,
    readable,
)
from ropewalk.data.store.hashing import canonical_json
from ropewalk.errors import UserError

SPLIT_DOMAIN = "long"  # where corpus.stdlib and corpus.paths begin; what is shorter goes on to "short"
_INSTALLED = {"__pycache__", "site-packages", "dist-packages"}


@dataclass
class Source:
    """One source and what was found there.

    Attributes:
        config: where it is.
        name: what the names of its documents begin with; different for each source.
        output: directory that is being prepared; where it lies in the source, it is no part of it.
        skipped: files left out, by reason.
        units: number of them.
        bytes: size of all files.
        digest: xxh3 over the names and contents of all files, once they are listed.
    """

    config: SourceConfig
    name: str
    stdlib: bool = False
    output: Path | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    units: int = 0
    bytes: int = 0
    digest: str = ""

    def described(self) -> dict[str, Any]:
        """The manifest's entry for the source, without the path."""
        settings = {key: value for key, value in asdict(self.config).items() if value not in (None, [])}
        del settings["path"]
        return {"name": self.name, **settings, "bytes": self.bytes, "xxh3": self.digest}


def corpus_sources(corpus: CorpusConfig, output: Path | None = None) -> list[Source]:
    """The sources of a configuration, in order, each with a name of its own; ``output`` is read by none of them.

    Raises:
        UserError: for a path that does not exist or lies in another, an unknown kind, or a hub dataset without a
            revision.
    """
    named = [Source(SourceConfig(SPLIT_DOMAIN, "", "repositories"), "stdlib", True)] if corpus.stdlib else []
    for path in corpus.paths:
        _check_path("corpus.paths", path)
        named.append(Source(SourceConfig(SPLIT_DOMAIN, path, column=corpus.column), _name_of(path)))
    for source in corpus.sources:
        one_of("kind of a source", source.kind, ("files", "repositories", "dataset"))
        exists = Path(source.path).exists()
        if exists or source.kind != "dataset":
            _check_path("corpus.sources", source.path)
        elif source.revision is None:
            raise UserError(
                f"corpus.sources names the hub dataset {source.path} without a revision; give its commit, so that the "
                "same configuration is the same data"
            )
        if source.chat and source.kind == "repositories":
            raise UserError(f"corpus.sources: {source.path} cannot be repositories and chat at once")
        named.append(Source(source, _name_of(source.path) if exists else source.path))
    counts: Counter[str] = Counter()
    for source_ in named:
        counts[source_.name] += 1
        if counts[source_.name] > 1:
            source_.name = f"{source_.name}#{counts[source_.name]}"
        source_.output = output
    for one, other in permutations(named, 2):
        _check_apart(one, other)
    return named


def _check_apart(one: Source, other: Source) -> None:
    """Raise UserError for a source within another: documents held out under one name would be trained under another."""
    reads = [(source.config.kind, source.config.column, source.config.chat, source.stdlib) for source in (one, other)]
    inner, outer = (os.path.realpath(source.config.path) for source in (one, other))
    if reads[0] == reads[1] and one.config.kind != "dataset" and Path(inner).is_relative_to(outer):
        raise UserError(
            f"{one.config.path} lies in {other.config.path}, or is the same, and both are sources: its documents would "
            "be in the store twice; name it once, and set its share in data.mixture"
        )


def _name_of(path: str) -> str:
    """The last part of a path as it is given: behind a link of the hub's cache is a file with a hash for a name."""
    return os.path.basename(os.path.abspath(path)) or "root"


def _check_path(key: str, path: str) -> None:
    try:
        path.encode()
        status = os.stat(path)
    except UnicodeEncodeError as error:
        raise UserError(f"{key} names {path!r}, which is not UTF-8; rename it") from error
    except FileNotFoundError as error:
        raise UserError(f"{key} names {path}, which does not exist; correct it") from error
    except OSError as error:
        raise UserError(f"{key} names {path}, which cannot be read ({error.strerror}); correct it") from error
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        raise UserError(f"{key} names {path}, which is neither a directory nor a regular file; name one of these")


def list_units(source: Source, shard_bytes: int) -> Iterator[Unit]:
    """The units of a source, in order, none much larger than a shard where it can be divided.

    Every file is read once, for the digest: a corpus that changed is noticed, however it changed.
    """
    digest = xxhash.xxh3_128()
    column = source.config.column or ("messages" if source.config.chat else "text")
    for unit in _units(source, shard_bytes):
        source.units += 1
        source.bytes += unit.bytes
        if unit.start == 0 and (unit.dataset is None or Path(unit.root).exists()):
            files = [os.path.join(unit.root, file) for file in unit.files] or _files_of(Path(unit.root))
            digest.update(canonical_json([unit.kind, unit.name, list(unit.files)]).encode())
            for file in files:
                digest.update(_digest(file))
        yield replace(unit, column=column, chat=source.config.chat)
    if source.config.revision is not None:
        digest.update(source.config.revision.encode())
    source.digest = digest.hexdigest()


def deal_shards(sources: Sequence[Source], shard_bytes: int) -> list[tuple[int, list[Unit]]]:
    """The units of all sources, dealt in order to shards of one source and about ``shard_bytes`` each."""
    shards: list[tuple[int, list[Unit]]] = []
    for number, source in enumerate(sources):
        size = 0
        for unit in list_units(source, shard_bytes):
            # Of a share of a streamed dataset no size is known; it may be a whole file of the hub.
            weight = unit.bytes or (shard_bytes if unit.dataset else 1)
            if size == 0 or size + weight > shard_bytes:
                shards.append((number, []))
                size = 0
            shards[-1][1].append(unit)
            size += weight
    return shards


def write_units(work: Path, shard: int, units: list[Unit]) -> None:
    """Say what a shard reads."""
    path = work / f"units-{shard:05d}.json"
    path.write_text(json.dumps([asdict(unit) for unit in units]) + "\n", encoding="utf-8")


def read_units(work: Path, shard: int) -> list[Unit]:
    """Units of a shard."""
    listed = json.loads((work / f"units-{shard:05d}.json").read_text(encoding="utf-8"))
    chosen = [{**unit, "files": tuple(unit["files"])} for unit in listed]
    return [Unit(**{**unit, "dataset": unit["dataset"] and tuple(unit["dataset"])}) for unit in chosen]


def _files_of(path: Path) -> list[str]:
    return [str(file) for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [str(path)]


def _digest(path: str) -> bytes:
    digest = xxhash.xxh3_128()
    with readable(path), open(path, "rb", buffering=0) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.digest()


def _units(source: Source, shard_bytes: int) -> Iterator[Unit]:
    config, path = source.config, Path(source.config.path)
    if source.stdlib:
        root = Path(sysconfig.get_paths()["stdlib"])
        yield from _repositories(source, root, _INSTALLED, {".py"})
    elif config.kind == "repositories":
        yield from _repositories(source, path, {"__pycache__"}, CODE | PROSE | set(config.suffixes))
    elif config.kind == "dataset":
        yield from _dataset_units(source, shard_bytes)
    elif path.is_file():
        yield from _file_units(source, path, source.name, shard_bytes)
    else:
        for file in _walk(source, path, set()):
            yield from _file_units(source, path / file, f"{source.name}/{file}", shard_bytes)


def _repositories(source: Source, root: Path, excluded: set[str], suffixes: set[str]) -> Iterator[Unit]:
    """One unit for each file or directory of ``root``; code lies in it in the order of paths.

    Of the standard library every package or module is one; installed packages are not taken.
    """
    tops: dict[str, list[str]] = {}
    for file in _walk(source, root, excluded):
        suffix = os.path.splitext(file)[1]
        if suffix in suffixes:
            tops.setdefault(file.partition("/")[0], []).append(file)
        elif not source.stdlib:
            source.skipped[f"unknown kind {suffix or os.path.basename(file)}"] += 1
    for name, files in sorted(tops.items()):
        size = sum(os.stat(os.path.join(root, file)).st_size for file in files)
        yield Unit("repository", f"{source.name}/{name}", os.path.abspath(root), tuple(files), bytes=size)


def _file_units(source: Source, path: Path, name: str, shard_bytes: int) -> Iterator[Unit]:
    size = path.stat().st_size
    root = os.path.abspath(path)  # a link keeps its own suffix
    if path.suffix in PROSE | CODE | set(source.config.suffixes) and not source.config.chat:
        yield Unit("text", name, root, bytes=size)
    elif path.name.endswith(JSONL):
        step = max(size, 1) if compression(root) else shard_bytes
        for start in range(0, max(size, 1), step):
            stop = start + step
            yield Unit(
                "jsonl", name, root, start=start, stop=stop if stop < size else -1, bytes=min(step, size - start)
            )
    elif path.suffix == ".parquet":
        yield from _parquet_units(name, root, shard_bytes)
    else:
        source.skipped[f"unknown kind {path.suffix or path.name}"] += 1


def _parquet_units(name: str, root: str, shard_bytes: int) -> Iterator[Unit]:
    with open_parquet(root) as file:
        sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    first = total = 0
    for group, size in enumerate(sizes):
        total += size
        if total >= shard_bytes or group == len(sizes) - 1:
            yield Unit("parquet", name, root, start=first, stop=group + 1, bytes=total)
            first, total = group + 1, 0


def _dataset_units(source: Source, shard_bytes: int) -> Iterator[Unit]:
    config, path = source.config, Path(source.config.path)
    root = os.path.abspath(path) if path.exists() else config.path
    if (path / "state.json").is_file():  # what save_to_disk() writes
        with datasets_errors(root):
            saved = open_dataset(root, None)
        shares = max(1, -(-saved.data.nbytes // shard_bytes))
        bounds = [len(saved) * share // shares for share in range(shares + 1)]
        for start, stop in pairwise(bounds):
            yield Unit("dataset", source.name, root, start=start, stop=stop, bytes=saved.data.nbytes // shares)
        return
    chosen = config.subset, config.split, config.revision
    with datasets_errors(root):
        shares = open_dataset(root, chosen).num_shards
    for share in range(shares):
        yield Unit("dataset", source.name, root, start=share, stop=shares, dataset=chosen)


def _walk(source: Source, root: Path, excluded: set[str]) -> Iterator[str]:
    """The files under ``root``, relative to it, in the order of their paths' parts; some are left out and counted."""
    skipped, resolved = source.skipped, root.resolve()
    output = source.output and source.output.resolve()
    paths: list[tuple[str, ...]] = []  # the parts of their paths
    for folder, directories, files in os.walk(root, onerror=_unreadable):
        parents = Path(folder).relative_to(root).parts
        kept = [name for name in directories if name not in excluded and resolved.joinpath(*parents, name) != output]
        skipped["hidden"] += sum(name.startswith(".") for name in (*kept, *files))
        skipped["linked directory"] += sum(os.path.islink(os.path.join(folder, name)) for name in kept)
        directories[:] = [name for name in kept if not name.startswith(".")]
        paths.extend((*parents, name) for name in files if not name.startswith("."))
    blobs = [parent.parent / "blobs" for parent in (resolved, *resolved.parents) if parent.name == "snapshots"]
    for parts in sorted(paths):
        if reason := _fault(os.path.join(root, *parts), [resolved, *blobs]):
            skipped[reason] += 1
        else:
            yield "/".join(parts)


def _fault(path: str, roots: Sequence[Path]) -> str | None:
    """Why a file is left out, from one look at it; ``roots``: where a link may lead, the hub's blobs among them."""
    try:
        path.encode()
        status = os.stat(path)
    except UnicodeEncodeError:
        return "name not UTF-8"
    except OSError as error:
        return {errno.ELOOP: "link loop", errno.ENOENT: "dangling link"}.get(error.errno or 0, "unreadable")
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if os.path.islink(path) and not any(Path(path).resolve().is_relative_to(root) for root in roots):
        return "link out of the directory"
    return None if os.access(path, os.R_OK) else "unreadable"


def _unreadable(error: OSError) -> None:
    """Raise an error that os.walk would pass over in silence."""
    raise UserError(
        f"{error.filename} cannot be listed ({error.strerror}); make it readable, or move it out of the source"
    ) from error
