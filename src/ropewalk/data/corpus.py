"""Raw documents: the interpreter's standard library and the files that a user names."""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ropewalk.data.hashing import canonical_json, sha256_text

PROSE = {".txt", ".md", ".rst"}
_CODE = ".c .cc .cpp .cu .go .h .hpp .java .jl .js .kt .lua .php .pl .pm .py .r .rb .rs .scala .sh .sql .swift .tex .ts"
CODE = set(_CODE.split())


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        name: where it came from; never an absolute path.
        parts: its text, in parts that may be tokenized apart (the files of a package).
    """

    name: str
    parts: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.parts)

    @property
    def bytes(self) -> int:
        """Size of the text in UTF-8."""
        return sum(len(part.encode()) for part in self.parts)


@dataclass
class Corpus:
    """Documents in a fixed order, and the number of files left out by reason."""

    documents: list[Document] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def sha256(self) -> str:
        """SHA-256 over names and texts, in order."""
        return sha256_text(canonical_json([[d.name, sha256_text(d.text)] for d in self.documents]))


def load_corpus(stdlib: bool, paths: Sequence[str]) -> Corpus:
    """Read every document.

    Args:
        stdlib: take the running interpreter's standard library.
        paths: files and directories.

    Raises:
        ValueError: for a path that does not exist, a damaged file, or no document at all.
    """
    corpus = Corpus()
    if stdlib:
        add_packages(corpus, Path(sysconfig.get_paths()["stdlib"]), "stdlib")
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"corpus.paths names {path}, which does not exist; correct it")
        _add_path(corpus, path)
    _number_repeated_names(corpus)
    if not corpus.documents:
        raise ValueError(
            f"the corpus has no documents (skipped: {dict(+corpus.skipped)}); "
            "set corpus.stdlib=true or corpus.paths=[...]"
        )
    return corpus


def add_packages(corpus: Corpus, root: Path, label: str) -> None:
    """Add the Python code under ``root``: one document per top-level package or module.

    A package's files follow each other in the order of their paths, each under a comment with its path, as
    ProLong concatenates repositories. Installed packages (site-packages) are not taken.
    """
    packages: dict[str, list[str]] = {}
    for path in _walk(corpus, root, {"__pycache__", "site-packages", "dist-packages"}):
        text = _read_text(corpus, path) if path.suffix == ".py" else None
        if text is not None:
            relative = path.relative_to(root)
            # One newline at the end makes the join a place where no tokenizer merges.
            packages.setdefault(relative.parts[0], []).append(f"# {relative.as_posix()}\n{text}".rstrip() + "\n")
    corpus.documents.extend(Document(f"{label}/{name}", tuple(parts)) for name, parts in sorted(packages.items()))


def _number_repeated_names(corpus: Corpus) -> None:
    """Make names unique: the second ``docs/a.md`` of two directories of one name becomes ``docs/a.md#2``."""
    seen: Counter[str] = Counter()
    for place, document in enumerate(corpus.documents):
        seen[document.name] += 1
        if seen[document.name] > 1:
            corpus.documents[place] = replace(document, name=f"{document.name}#{seen[document.name]}")


def _add_path(corpus: Corpus, path: Path) -> None:
    if path.is_file():
        corpus.documents.extend(_file_documents(corpus, path, path.name))
        return
    for file in _walk(corpus, path, set()):
        name = (Path(path.resolve().name) / file.relative_to(path)).as_posix()
        corpus.documents.extend(_file_documents(corpus, file, name))


def _walk(corpus: Corpus, root: Path, excluded: set[str]) -> Iterator[Path]:
    """The files under ``root`` in the order of their paths; hidden ones and links outwards are counted."""
    found: list[Path] = []
    for place, directories, files in os.walk(root):
        here = Path(place)
        kept = [name for name in directories if name not in excluded]
        corpus.skipped["hidden"] += sum(name.startswith(".") for name in (*kept, *files))
        corpus.skipped["linked directory"] += sum((here / name).is_symlink() for name in kept)
        directories[:] = [name for name in kept if not name.startswith(".")]
        found.extend(here / name for name in files if not name.startswith("."))
    resolved = root.resolve()
    for path in sorted(found, key=lambda path: path.relative_to(root).parts):
        if path.is_symlink() and not path.resolve().is_relative_to(resolved):
            corpus.skipped["link out of the directory"] += 1
        else:
            yield path


def _file_documents(corpus: Corpus, path: Path, name: str) -> Iterator[Document]:
    """The documents of one file; a file of an unknown kind is counted."""
    if path.suffix in PROSE | CODE:
        text = _read_text(corpus, path)
        texts = iter([] if text is None else [(name, text)])
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        texts = _jsonl_texts(path, name)
    elif path.suffix == ".parquet":
        texts = _parquet_texts(path, name)
    else:
        corpus.skipped[f"unknown kind {path.suffix or path.name}"] += 1
        return
    for document, text in texts:
        if text.strip():
            yield Document(document, (text,))
        else:
            corpus.skipped["empty"] += 1


def _read_text(corpus: Corpus, path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        corpus.skipped["not UTF-8"] += 1
        return None


def _jsonl_texts(path: Path, name: str) -> Iterator[tuple[str, str]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}, is not a JSON object with a 'text': {error!r}") from error
            yield f"{name}:{number}", _checked_text(text, path, number)


def _parquet_texts(path: Path, name: str) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        raise ValueError(f"{path} has the columns {file.schema_arrow.names}; name the one with the documents 'text'")
    number = 0
    for rows in file.iter_batches(columns=["text"]):
        for text in rows.column(0).to_pylist():
            number += 1
            yield f"{name}:{number}", _checked_text(text, path, number)


def _checked_text(text: object, path: Path, number: int) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{path}, row {number}: 'text' is {type(text).__name__}, not a string; correct the file")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}, row {number}: 'text' is not valid Unicode ({error}); correct the file") from error
    return text
