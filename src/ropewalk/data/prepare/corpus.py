"""Documents, read one at a time: text and code, JSON lines, parquet, whole repositories, Hugging Face datasets."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import IO, Any

import zstandard

from ropewalk.data.prepare.chat import COLUMNS, check_columns, read_messages, read_tools
from ropewalk.data.prepare.token_files import BadRow, Skipped, check_unicode
from ropewalk.errors import UserError

PROSE = {".txt", ".md", ".rst"}
_CODE = ".c .cc .cpp .cu .go .h .hpp .java .jl .js .kt .lua .php .pl .pm .py .r .rb .rs .scala .sh .sql .swift .tex .ts"
CODE = set(_CODE.split())
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MAX_DOCUMENT_BYTES = 2**29  # of a file of text, or of a row; larger ones do not fit in the memory of a process
MAX_LINE = 2**24  # characters; tokenizers take a gigabyte for a line of this length
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # with which their files begin
MAX_WINDOW = 2**31  # bytes that zstd --long=31 needs to decompress
MAX_SPACES = 400_000  # in a row; the regular expressions of tokenizers run out of stack beyond
_SPACES = re.compile(r"\s{2,}")
_NOTHING: tuple[Any, ...] = (None, "", [], {})
_COMMENTS = {"# ": ".jl .pl .pm .py .r .rb .sh", "-- ": ".lua .sql", "% ": ".tex"}
COMMENT = {suffix: sign for sign, suffixes in _COMMENTS.items() for suffix in suffixes.split()}


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        name: where it came from; never an absolute path.
        parts: its text, in parts that may be tokenized apart (the files of a repository).
        messages: of a conversation, which has no parts: ``role``, ``content`` and what else the row has for each.
        tools: that its template is to be given; None: none.
        unread: columns of a conversation's row that hold something else.
    """

    name: str
    parts: tuple[str, ...]
    messages: tuple[dict[str, Any], ...] = ()
    tools: list[Any] | None = None
    unread: tuple[str, ...] = ()

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


def read_documents(unit: Unit, skipped: Skipped) -> Iterator[Document]:
    """The documents of a unit; what is left out is counted in ``skipped`` by reason.

    Left out are empty documents, files and rows that are not UTF-8, rows that are null, nested without end, without the
    column or with something else in it, files and rows above 512 MB, and documents (of a repository: files; of a
    conversation: messages) with a line of more than 2^24 characters or more than 400,000 spaces in a row. A byte order
    mark is no text. Of files of text and code, line ends are read as ``\\n``, whatever they are.

    Raises:
        UserError: for a damaged file, a parquet file or dataset without the column, or a row left out if
            ``skipped.strict``.
    """
    if unit.kind == "repository":
        yield from _repository(unit, skipped)
        return
    for number, row in _READERS[unit.kind](unit):
        name = unit.name if unit.kind == "text" else f"{_prefix(unit)}:{number}"
        try:
            document = _document(name, row, unit)
        except BadRow as bad:
            after = f" after byte {unit.start}" if unit.kind == "jsonl" and unit.start else ""
            skipped.leave_out(bad, unit.root if unit.kind == "text" else f"{unit.root}, row {number}{after}")
            continue
        if document is None:
            skipped["empty"] += 1
        else:
            yield document


def _prefix(unit: Unit) -> str:
    return f"{unit.name}@{unit.start}" if unit.dataset or (unit.kind == "jsonl" and unit.start) else unit.name


def _document(name: str, row: Any, unit: Unit) -> Document | None:
    """The document of a row: a text, or a mapping of columns; None: it is empty.

    Raises:
        BadRow: for one that cannot be used.
    """
    if isinstance(row, BadRow):
        raise row
    if row == "":
        return None
    column = unit.column
    if unit.kind == "text":
        value = row
    elif not isinstance(row, Mapping):
        several = "a list, where each line of JSON lines is one row"
        raise BadRow(several if isinstance(row, list) else f"not an object with the column {column!r}")
    elif (key := column_of(row, unit)) is None:
        raise BadRow(f"no column {column!r}")
    else:
        value = row[key]
    if isinstance(value, bytes):  # text without the type, as Spark writes it
        value = _decoded(value)
    if unit.chat:
        check_columns(row)
        messages = read_messages(value, row.get("system"))
        for message in messages:
            if reason := unfit(message["content"]):
                raise BadRow(reason)
        unread = tuple(column for column in row if column not in (key, *COLUMNS) and row[column] not in _NOTHING)
        return Document(name, (), messages, read_tools(row.get("tools")), unread)
    if not isinstance(value, str):
        raise BadRow("null" if value is None else f"{column!r} is {type(value).__name__}, not text")
    check_unicode(value)
    value = value.removeprefix("\ufeff")
    if reason := unfit(value):
        raise BadRow(reason)
    return Document(name, (value,)) if value.strip() else None


def column_of(names: Iterable[str], unit: Unit) -> str | None:
    """The column that is read: the unit's, or ShareGPT's name for messages; None: it is not there."""
    names = set(names)
    wanted = (unit.column, "conversations") if unit.chat and unit.column == "messages" else (unit.column,)
    return next((name for name in wanted if name in names), None)


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


def _repository(unit: Unit, skipped: Skipped) -> Iterator[Document]:
    """One document: the files in the order of their paths, each under a comment with its path."""
    parts = []
    for file in unit.files:
        path = os.path.join(unit.root, file)
        try:
            text = _file_text(path)
            if reason := unfit(text):
                raise BadRow(reason)
        except BadRow as bad:
            skipped.leave_out(bad, path)
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


def _text(unit: Unit) -> Iterator[tuple[int, Any]]:
    try:
        yield 1, _file_text(unit.root)
    except BadRow as bad:
        yield 1, bad


def _file_text(path: str) -> str:
    with readable(path), open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size > MAX_DOCUMENT_BYTES:
            raise BadRow("too large")
        text = _decoded(file.readall())
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn an error of the system about a file that is read into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); correct that, or move it away") from error


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRow("not UTF-8") from None


def _jsonl(unit: Unit) -> Iterator[tuple[int, Any]]:
    """The rows whose line begins in [start, stop)."""
    number, position = 0, unit.start
    try:
        with _open_lines(unit.root) as lines:
            if unit.start:  # a line that begins before belongs to the stretch before
                lines.seek(unit.start - 1)
                position += len(lines.readline()) - 1
            while unit.stop < 0 or position < unit.stop:
                line = lines.readline(MAX_DOCUMENT_BYTES + 1)
                if not line:
                    return
                number += 1
                position += len(line)
                too_large = len(line) > MAX_DOCUMENT_BYTES
                while too_large and line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_DOCUMENT_BYTES)
                    position += len(line)
                yield number, BadRow("too large") if too_large else _json_row(line)
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        needs_dictionary = "Dictionary mismatch" in str(error)
        fix = "compress it again without a dictionary" if needs_dictionary else "fetch it again"
        raise UserError(f"{unit.root} is damaged after line {number} ({error}); {fix}") from error


def _json_row(line: bytes) -> Any:
    try:
        text = _decoded(line)
        return json.loads(text) if text.strip() else ""
    except BadRow as bad:
        return bad
    except ValueError:
        return BadRow("not JSON")
    except RecursionError:
        return BadRow("nested too deep")


def compression(path: str) -> str:
    """``.gz``, ``.zst`` or nothing: that of JSON lines, whatever suffix a download has left or lost."""
    with readable(path), open(path, "rb") as file:
        begin = file.read(4)
    if begin[:2] == _GZIP:
        return ".gz"
    if begin == _ZSTD:
        return ".zst"
    is_plain = begin.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{"
    return "" if is_plain else next((suffix for suffix in (".gz", ".zst") if path.endswith(suffix)), "")


def _open_lines(path: str) -> IO[bytes] | gzip.GzipFile:
    match compression(path):
        case ".gz":
            return gzip.open(path, "rb")
        case ".zst":
            return io.BufferedReader(_ZstdFile(path), 2**20)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """The content of all frames of a zstd file; zstandard's own reader would take a torn one for whole."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 closed with this one
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._frame = self._decompressor.decompressobj()
        self._begun, self._ready = False, b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = self._decompressor.decompressobj(), False
            packed = packed or self._file.read(2**16)
            if not packed:
                if self._begun:
                    raise EOFError("the last frame is torn")
                return 0
            self._begun, self._ready = True, self._frame.decompress(packed)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _parquet(unit: Unit) -> Iterator[tuple[int, Any]]:
    with open_parquet(unit.root) as file:
        names = file.schema_arrow.names
        column = column_of(names, unit)
        if column is None:
            raise UserError(
                f"{unit.root} has the columns {names}; name the one with the documents (column=, or corpus.column): "
                f"{unit.column!r} is none"
            )
        columns = [column, *(name for name in COLUMNS if unit.chat and name in names)]
        if twice := [name for name in columns if names.count(name) > 1]:
            raise UserError(f"{unit.root} has {names.count(twice[0])} columns {twice[0]!r}; write it with one of them")
        others = dict.fromkeys(set(names) - set(columns), ...) if unit.chat else {}  # there, and not looked into
        stop = file.num_row_groups if unit.stop < 0 else unit.stop
        number = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
        batches = file.iter_batches(64, row_groups=list(range(unit.start, stop)), columns=columns)
        while (rows := next_rows(batches, unit.root, number)) is not None:
            for cells in zip(*(rows.column(name) for name in columns), strict=True):
                number += 1
                try:
                    yield number, {name: cell.as_py() for name, cell in zip(columns, cells, strict=True)} | others
                except UnicodeDecodeError:
                    yield number, BadRow("not UTF-8")
                except (ValueError, OverflowError) as error:  # as a time past the year 9999
                    yield number, BadRow("a value out of range", str(error))


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


def _dataset(unit: Unit) -> Iterator[tuple[int, Any]]:
    """Rows of a saved dataset, or of share ``start`` of ``stop`` of one that is streamed."""
    with datasets_errors(unit.root):
        opened = open_dataset(unit.root, unit.dataset)
        if unit.dataset is None:
            rows = (opened[index] for index in range(unit.start, unit.stop))
        else:
            rows = iter(opened.shard(num_shards=unit.stop, index=unit.start))
    first = 1 + (unit.start if unit.dataset is None else 0)
    for number in count(first):
        with datasets_errors(unit.root):
            row = next(rows, None)
        if row is None:
            return
        if number == first and column_of(row, unit) is None:
            raise UserError(f"{unit.root} has the columns {sorted(row)}; {unit.column!r} is none of them")
        yield number, row


@contextmanager
def datasets_errors(name: str) -> Iterator[None]:
    """Turn whatever the datasets library raises about a user's data set into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the dataset {name} cannot be read: {type(error).__name__}: {reason}; check path, subset, split, revision "
            "and the network, or name its files as a source of kind=files"
        ) from error


def open_dataset(root: str, chosen: tuple[str | None, str, str | None] | None) -> Any:
    """The rows of save_to_disk(); with ``chosen`` (subset, split, revision) a hub dataset or data files, streamed."""
    import datasets

    if chosen is None:
        return datasets.load_from_disk(root)
    return datasets.load_dataset(root, chosen[0], split=chosen[1], revision=chosen[2], streaming=True)


_READERS = {"text": _text, "jsonl": _jsonl, "parquet": _parquet, "dataset": _dataset}
