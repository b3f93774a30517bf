"""The manifest of a packed store: what it holds, and how a directory is told from a whole store."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ropewalk.data.hashing import canonical_json, sha256_text
from ropewalk.files import inside

FORMAT = "ropewalk-packed"
VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class StoredFile:
    """A file of the store: its path under the root (with /), its size and its SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard(StoredFile):
    """A file of whole sequences of uint32 tokens, little endian."""

    sequences: int


@dataclass(frozen=True)
class DomainInfo:
    """One domain of a store.

    Attributes:
        sequences: sequences of the store's length.
        documents: pieces of documents in them.
        tokens: tokens without padding.
        trained_tokens: tokens that are predicted: all but the first of each piece.
        padding: tokens after the last piece of a sequence.
        shards: the token files, in order.
        offsets: int64 .npy (sequences + 1,), where each sequence's pieces start in ``ends``.
        ends: int32 .npy (documents,), where each piece ends in its sequence.
    """

    sequences: int
    documents: int
    tokens: int
    trained_tokens: int
    padding: int
    shards: tuple[Shard, ...]
    offsets: StoredFile
    ends: StoredFile

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """Every file of the domain."""
        return (*self.shards, self.offsets, self.ends)


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json, beside its fingerprint."""

    sequence_length: int
    tokenizer: dict[str, Any]
    domains: dict[str, DomainInfo]
    accounting: dict[str, Any]

    def content(self) -> dict[str, Any]:
        """The canonical content: what the fingerprint is taken of."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical content, which names every file's SHA-256."""
        return sha256_text(canonical_json(self.content()))

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({**self.content(), "fingerprint": self.fingerprint}, indent=2) + "\n"


def read_manifest(root: Path) -> Manifest:
    """Read ``root``'s manifest and check that it is one, of this version, and as it was written.

    Raises:
        ValueError: for a missing, torn, foreign, newer or altered manifest.
    """
    path = root / MANIFEST
    mend = "make one with data_prep/prepare.py"
    if not path.is_file():
        what = "no such directory" if not root.is_dir() else f"it has no {MANIFEST}, so its writing never finished"
        raise ValueError(f"{root} is not a packed store: {what}; {mend}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is torn: {error}; {mend}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not the manifest of a packed store (format is not {FORMAT!r}); {mend}")
    if content.get("version") != VERSION:
        raise ValueError(f"{path} has version {content.get('version')}, this code reads {VERSION}; {mend}")
    try:
        manifest = _parse(content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks or mistypes {error}; {mend}") from error
    if manifest.fingerprint != content.get("fingerprint"):
        raise ValueError(f"{path} was altered: its fingerprint is not that of its content; {mend}")
    return manifest


def _parse(content: dict[str, Any]) -> Manifest:
    domains = {}
    for name, entry in content["domains"].items():
        files = {key: StoredFile(**entry[key]) for key in ("offsets", "ends")}
        shards = tuple(Shard(**shard) for shard in entry["shards"])
        domains[check_domain_name(name)] = DomainInfo(**{**entry, **files, "shards": shards})
    return Manifest(content["sequence_length"], content["tokenizer"], domains, content["accounting"])


def check_domain_name(name: str) -> str:
    """``name``, or ValueError where it cannot be a directory of a store."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in (TOKENIZER, MANIFEST):
        raise ValueError(
            f"domain name {name!r} cannot be used; begin with a letter or digit, go on with letters, digits, "
            f"'_', '-' or '.', and avoid {TOKENIZER!r} and {MANIFEST!r}"
        )
    return name


def stored_path(root: Path, file: str) -> Path:
    """The path of a stored file, or ValueError where it is absolute, has ``..`` or leads out of ``root``."""
    relative = PurePosixPath(file)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"{root / MANIFEST} names {file!r}, which is no path in the store; do not use it")
    return inside(root, file)
