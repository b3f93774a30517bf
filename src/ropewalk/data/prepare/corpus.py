"""Documents, read one at a time: text and code, JSON lines, parquet, whole repositories, Hugging Face datasets."""

from __future__ import annotations

import gzip
import heapq
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ropewalk.data.store.hashing import stable_key
from ropewalk.errors import UserError

PROSE = {".txt", ".md", ".rst"}
_CODE = ".c .cc .cpp .cu .go .h .hpp .java .jl .js .kt .lua .php .pl .pm .py .r .rb .rs .scala .sh .sql .swift .tex .ts"
CODE = set(_CODE.split())
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MAX_DOCUMENT_BYTES = 2**29  # of a file of text, or of a row; larger ones do not fit in the memory of a process
MAX_LINE = 2**24  # characters; tokenizers take a gigabyte for a line of this length
MAX_SPACES = 400_000  # in a row; the regular expressions of tokenizers run out of stack beyond
_SPACES = re.compile(r"\s{2,}")
_COMMENTS = {"# ": ".jl .pl .pm .py .r .rb .sh", "-- ": ".lua .sql", "% ": ".tex"}
COMMENT = {suffix: sign for sign, suffixes in _COMMENTS.items() for suffix in suffixes.split()}


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        name: where it came from; never an absolute path.
        parts: its text, in parts that may be tokenized apart (the files of a repository).
        messages: of a conversation, role and content each; it has no parts.
    """

    name: str
    parts: tuple[str, ...]
    messages: tuple[dict[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.parts)

    @property
    def bytes(self) -> int:
        """Size of the text in UTF-8."""
        return sum(len(part) if part.isascii() else len(part.encode()) for part in self.parts)


@dataclass(frozen=True)
class Unit:
    """A part of a corpus that is read by itself: a file, a stretch of one, a repository, a share of a dataset.

    Attributes:
        kind: text, jsonl, parquet, repository or dataset.
        name: of its documents, or what their names begin with.
        root: directory, file, or hub id.
        files: of a repository, relative to ``root``.
        start: first byte (jsonl), row group (parquet), row or share (dataset).
        stop: the one after the last; -1: to the end.
        bytes: size, as far as it is known.
        column: of rows, the one that is read.
        chat: whether the rows are lists of messages.
        dataset: of a hub dataset: ``subset``, ``split``, ``revision``.
    """

    kind: str
    name: str
    root: str
    files: tuple[str, ...] = ()
    start: int = 0
    stop: int = -1
    bytes: int = 0
    column: str = "text"
    chat: bool = False
    dataset: tuple[str | None, str, str | None] | None = None


def read_documents(unit: Unit, skipped: Counter[str]) -> Iterator[Document]:
    """The documents of a unit; what is left out is counted in ``skipped`` by reason.

    Left out are empty documents, files and rows that are not UTF-8, files and rows above 512 MB, and documents (of a
    repository: files; of a conversation: messages) with a line of more than 2^24 characters or more than 400,000 spaces
    in a row. Of files of text and code, line ends are read as ``\\n``, whatever they are.

    Raises:
        UserError: for a damaged file, or rows without the column or with something else in it.
    """
    if unit.kind == "repository":
        yield from _repository(unit, skipped)
        return
    if unit.kind == "text":
        text = _read_text(unit.root, skipped)
        rows: Iterator[tuple[str, Any]] = iter([] if text is None else [(unit.name, text)])
    else:
        rows = {"jsonl": _jsonl, "parquet": _parquet, "dataset": _dataset}[unit.kind](unit, skipped)
    for name, value in rows:
        if unit.chat:
            messages = _messages(value, unit.root, int(name.rpartition(":")[2]), unit.column)
            reasons = [reason for message in messages if (reason := unfit(message["content"]))]
            skipped.update(reasons[:1])
            if not reasons:
                yield Document(name, (), messages)
        elif not value.strip():
            skipped["empty"] += 1
        elif reason := unfit(value):
            skipped[reason] += 1
        else:
            yield Document(name, (value,))


def unfit(text: str) -> str | None:
    """Why a text cannot be tokenized, or None."""
    start = 0
    while len(text) - start > MAX_LINE:
        end = text.rfind("\n", start, start + MAX_LINE + 1)
        if end < 0:
            return "a line too long"
        start = end + 1
    if len(text) > MAX_SPACES and any(run.end() - run.start() > MAX_SPACES for run in _SPACES.finditer(text)):
        return "too many spaces in a row"
    return None


def _repository(unit: Unit, skipped: Counter[str]) -> Iterator[Document]:
    """One document: the files in the order of their paths, each under a comment with its path."""
    parts = []
    for file in unit.files:
        text = _read_text(os.path.join(unit.root, file), skipped)
        if text is None:
            continue
        if reason := unfit(text):
            skipped[reason] += 1
            continue
        suffix = os.path.splitext(file)[1]
        head = "" if suffix in PROSE else f"{COMMENT.get(suffix, '// ')}{file}\n"
        # One newline at the end makes the join a place where no tokenizer merges.
        part = f"{head}{text}".rstrip() + "\n"
        if part.strip():
            parts.append(part)
        else:
            skipped["empty"] += 1
    if parts:
        yield Document(unit.name, tuple(parts))


def _read_text(path: str, skipped: Counter[str]) -> str | None:
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size > MAX_DOCUMENT_BYTES:
            skipped["too large"] += 1
            return None
        content = file.readall()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _jsonl(unit: Unit, skipped: Counter[str]) -> Iterator[tuple[str, Any]]:
    """The rows whose line begins in [start, stop)."""
    path = Path(unit.root)
    name = unit.name if unit.start == 0 else f"{unit.name}@{unit.start}"
    number = 0
    with _open_lines(path) as lines:
        position = unit.start
        if unit.start:  # a line that begins before belongs to the stretch before
            lines.seek(unit.start - 1)
            position += len(lines.readline()) - 1
        try:
            while unit.stop < 0 or position < unit.stop:
                line = lines.readline(MAX_DOCUMENT_BYTES + 1)
                if not line:
                    return
                number += 1
                position += len(line)
                if len(line) > MAX_DOCUMENT_BYTES:
                    skipped["too large"] += 1
                    while line and not line.endswith(b"\n"):
                        line = lines.readline(MAX_DOCUMENT_BYTES)
                        position += len(line)
                    continue
                text = _decoded(line, position == len(line), skipped)
                if text is not None:
                    yield f"{name}:{number}", _value_of(text, unit, path, number)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path} is damaged after line {number} ({error}); fetch it again") from error


def _decoded(line: bytes, first: bool, skipped: Counter[str]) -> str | None:
    """A line as text, without a byte order mark; None for one that is blank or not UTF-8, which is counted."""
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return None
    if not text.strip():
        skipped["empty"] += 1
        return None
    return text


def _value_of(line: str, unit: Unit, path: Path, number: int) -> Any:
    where = f"{path}, line {number}" + (f" after byte {unit.start}" if unit.start else "")
    try:
        value = json.loads(line)[unit.column]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}, is not a JSON object with a {unit.column!r}: {error!r}") from error
    return value if unit.chat else _checked_text(value, path, number, unit.column)


def _open_lines(path: Path) -> IO[bytes] | gzip.GzipFile | io.BufferedReader:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return path.open("rb")


def _parquet(unit: Unit, skipped: Counter[str]) -> Iterator[tuple[str, Any]]:
    with open_parquet(unit.root) as file:
        if unit.column not in file.schema_arrow.names:
            raise UserError(
                f"{unit.root} has the columns {file.schema_arrow.names}; name the one with the documents: "
                f"{unit.column!r} is none"
            )
        stop = file.num_row_groups if unit.stop < 0 else unit.stop
        number = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
        batches = file.iter_batches(64, row_groups=list(range(unit.start, stop)), columns=[unit.column])
        while (rows := next_rows(batches, unit.root, number)) is not None:
            for cell in rows.column(0):
                number += 1
                try:
                    value = cell.as_py()
                except UnicodeDecodeError:
                    skipped["not UTF-8"] += 1
                    continue
                yield (
                    f"{unit.name}:{number}",
                    value if unit.chat else _checked_text(value, unit.root, number, unit.column),
                )


def open_parquet(path: str) -> Any:
    """A parquet file.

    Raises:
        UserError: where it is none.
    """
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole parquet file ({error}); fetch it again") from error


def next_rows(batches: Iterator[Any], path: str, number: int) -> Any:
    """The next rows of a parquet file, or None."""
    import pyarrow

    try:
        return next(batches, None)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged after row {number} ({error}); fetch it again") from error


def _dataset(unit: Unit, skipped: Counter[str]) -> Iterator[tuple[str, Any]]:
    """Rows of a saved dataset, or of share ``start`` of ``stop`` of one that is streamed."""
    import datasets

    if unit.dataset is None:
        saved = datasets.load_from_disk(unit.root)
        rows = (saved[index] for index in range(unit.start, unit.stop))
        first = unit.start
    else:
        subset, split, revision = unit.dataset
        streamed = datasets.load_dataset(unit.root, subset, split=split, revision=revision, streaming=True)
        rows = iter(streamed.shard(num_shards=unit.stop, index=unit.start))
        first = 0
    name = unit.name if unit.dataset is None else f"{unit.name}@{unit.start}"
    for number, row in enumerate(rows, start=first + 1):
        if unit.column not in row:
            raise UserError(f"{unit.root} has the columns {sorted(row)}; {unit.column!r} is none of them")
        value = row[unit.column]
        yield f"{name}:{number}", value if unit.chat else _checked_text(value, unit.root, number, unit.column)


def _checked_text(text: object, path: str | Path, number: int, column: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{path}, row {number}: {column!r} is {type(text).__name__}, not a string; correct the file")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}, row {number}: {column!r} is not valid Unicode ({error}); correct the file") from error
    return text


def _messages(value: Any, path: str, number: int, column: str) -> tuple[dict[str, str], ...]:
    whole = isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )
    if not whole or not value:
        raise UserError(
            f"{path}, row {number}: {column!r} is {'an empty list' if whole else 'no list'} of objects with a 'role' "
            "and a 'content'; correct the file"
        )
    return tuple(
        {key: _checked_text(message[key], path, number, f"{column}.{key}") for key in ("role", "content")}
        for message in value
    )


SAMPLE_BYTES = 2**27  # of text, held in memory; a smaller corpus is taken whole


def sample_documents(units: Iterable[Unit]) -> list[Document]:
    """Documents in corpus order: those whose names hash lowest, until they have 128 MB together.

    What they are does not depend on the order in which the corpus is read.
    """
    chosen: list[tuple[int, int, int, Document]] = []  # a heap, the highest hash first
    size = 0
    skipped: Counter[str] = Counter()  # counted where the corpus is tokenized
    index = 0
    for unit in units:
        for document in read_documents(unit, skipped):
            heapq.heappush(chosen, (-stable_key("sample", document.name), -index, document.bytes, document))
            index += 1
            size += document.bytes
            while size - chosen[0][2] >= SAMPLE_BYTES:
                size -= heapq.heappop(chosen)[2]
    return [document for _, _, _, document in sorted(chosen, key=lambda entry: -entry[1])]
