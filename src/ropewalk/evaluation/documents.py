"""Held-out documents as token windows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ropewalk.data.store.tokenizer_files import adds_bos
from ropewalk.errors import UserError
from ropewalk.files import sha256_of_json

TEXT_SUFFIXES = (".txt", ".md")
SHORTEST = 64  # tokens; a shorter context has no bucket of positions of its own


class Document(NamedTuple):
    """A held-out document: its name, unique among the documents, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Windows:
    """The first ``length`` tokens of each document that has them, and a count of the others.

    Attributes:
        length: tokens of every window, the beginning-of-sequence token included if the tokenizer has one.
        tokens: document name -> LongTensor (length,).
        too_short: document name -> its tokens, for documents left out because they have fewer.
        beyond_limit: documents left out because ``max_documents`` came before them; not tokenized.
    """

    length: int
    tokens: dict[str, torch.Tensor]
    too_short: dict[str, int]
    beyond_limit: int

    @cached_property
    def sha256(self) -> str:
        """Of every window's name and tokens."""
        return sha256_of_json({name: ids.tolist() for name, ids in self.tokens.items()})

    @property
    def prefixes(self) -> dict[str, str]:
        """SHA-256 of each document's first tokens: two evaluations with the same ones read the same text and tokens."""
        return {name: sha256_of_json(ids[:SHORTEST].tolist()) for name, ids in self.tokens.items()}

    def counts(self) -> dict[str, Any]:
        """The counts for evaluation.json."""
        return {
            "used": len(self.tokens),
            "too_short": len(self.too_short),
            "too_short_tokens": self.too_short,
            "beyond_max_documents": self.beyond_limit,
            "window": self.length,
        }

    def __str__(self) -> str:
        return (
            f"documents: {len(self.tokens)} of {self.length:,} tokens; left out: {len(self.too_short)} shorter, "
            f"{self.beyond_limit} beyond max_documents"
        )


def validate_lengths(lengths: Sequence[int]) -> None:
    """Raise UserError unless ``lengths`` (tokens) ascend without repeats and each has a bucket of positions."""
    if not lengths or min(lengths) < SHORTEST:
        raise UserError(f"lengths={lengths} must name contexts of {SHORTEST} tokens or more; try [512,1024]")
    if list(lengths) != sorted(set(lengths)):
        raise UserError(f"lengths={lengths} must ascend without repeats; write {sorted(set(lengths))}")


def find_documents(directory: Path) -> Iterator[Document]:
    """The documents of a directory: heldout/documents.jsonl or documents.jsonl, else its .txt and .md files.

    Text files are read in sorted order, subdirectories included, and named by their path below ``directory``.

    Raises:
        UserError: there are none, a line of the jsonl is not a document, or two share a name.
    """
    names: set[str] = set()
    for document in _read(directory):
        if document.name in names:
            raise UserError(
                f"documents={directory} has two documents named {document.name!r}; runs are compared "
                "document by document, so give each its own name"
            )
        names.add(document.name)
        yield document
    if not names:
        raise UserError(
            f"documents={directory} holds no document: neither heldout/documents.jsonl, nor documents.jsonl, "
            f"nor {' or '.join(TEXT_SUFFIXES)} files; write held-out documents with data_prep/prepare.py "
            "(corpus.heldout_documents=16) or name a directory of text files"
        )


def make_windows(directory: Path, tokenizer: Any, length: int, max_documents: int | None = None) -> Windows:
    """One window for each document: its first ``length`` tokens.

    Raises:
        UserError: no document is long enough.
    """
    tokens: dict[str, torch.Tensor] = {}
    too_short: dict[str, int] = {}
    beyond_limit = 0
    for name, text in find_documents(directory):
        if max_documents is not None and len(tokens) == max_documents:
            beyond_limit += 1
            continue
        ids = beginning(tokenizer) + encode(tokenizer, text)
        if len(ids) < length:
            too_short[name] = len(ids)
        else:
            tokens[name] = torch.tensor(ids[:length])
    if not tokens:
        longest = max(too_short, key=lambda name: too_short[name])
        raise UserError(
            f"lengths={length} is longer than every document of documents={directory}: the longest, "
            f"{longest!r}, has {too_short[longest]} tokens; evaluate at that or less, or name longer ones"
        )
    return Windows(length, tokens, too_short, beyond_limit)


def beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token where the tokenizer's own encode begins with it, as the data of a run does."""
    return [tokenizer.bos_token_id] if adds_bos(tokenizer) else []


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of ``text`` with no special token added, and no warning about its length."""
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def token_count(tokenizer: Any, text: str) -> int:
    """Tokens of ``text`` as a model reads it, with the beginning-of-sequence token if the tokenizer's encode has it."""
    return len(beginning(tokenizer) + encode(tokenizer, text))


def _read(directory: Path) -> Iterator[Document]:
    for path in (directory / "heldout" / "documents.jsonl", directory / "documents.jsonl"):
        if path.is_file():
            yield from _read_jsonl(path)
            return
    for path in sorted(directory.rglob("*")):
        if path.suffix in TEXT_SUFFIXES and not path.is_dir():
            yield _checked(path.relative_to(directory).as_posix(), _content(path), str(path))


def _content(path: Path) -> str:
    """The text of a file, line ends as ``\\n``, without a byte order mark."""
    fix = "save it as text in UTF-8, or move it away"
    if not path.is_file():
        raise UserError(f"{path} is not a file that can be read; {fix}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {fix}") from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line.decode("utf-8-sig"))
                name, text = entry["name"], entry["text"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise _not_a_document(path, number) from error
            if isinstance(name, bool) or not isinstance(name, (str, int)) or not isinstance(text, str):
                raise _not_a_document(path, number)
            yield _checked(str(name), text, f"{path}, line {number}")


def _not_a_document(path: Path, number: int) -> UserError:
    form = '{"name": ..., "text": ...} object with a text, in UTF-8'
    return UserError(f"{path}, line {number} is not a document; each line holds one {form}")


def _checked(name: str, text: str, where: str) -> Document:
    try:
        (name + text).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where!r} has a name or text that is not valid Unicode; correct it") from error
    return Document(name, text)
