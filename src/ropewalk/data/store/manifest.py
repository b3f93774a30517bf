"""The manifest of a packed store: what it holds, and how a directory is told from a whole store."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ropewalk.data.store.hashing import canonical_json, sha256_text
from ropewalk.errors import UserError
from ropewalk.files import inside

FORMAT = "ropewalk-packed"
VERSION = 2  # 1 had no loss masks, no sources, and uint32 tokens always
READABLE = (1, 2)
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
# Entries of a domain that a manifest leaves out if absent.
_OPTIONAL = ("trained", "checks", "visuals", "visual_offsets")


@dataclass(frozen=True)
class StoredFile:
    """A file of the store: its path under the root (with /), its size and its SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard(StoredFile):
    """A file of whole sequences of tokens, little endian, of the manifest's ``token_dtype``.

    Attributes:
        sequences: how many.
        mask: a file of their loss masks, a row of ``ceil(sequence_length / 8)`` bytes each, most significant bit
            first; 1: the token is trained. None: every token is.
        media: a file of pixels or embeddings of their visuals, see store.visuals; None: they have none.
    """

    sequences: int
    mask: StoredFile | None = None
    media: StoredFile | None = None


@dataclass(frozen=True)
class DomainInfo:
    """One domain of a store.

    Attributes:
        sequences: sequences of the store's length.
        documents: pieces of documents in them.
        tokens: tokens without padding.
        trained_tokens: tokens that are predicted: all but the first of each piece, without those masked out.
        padding: tokens after the last piece of a sequence.
        shards: the token files, in order.
        offsets: int64 .npy (sequences + 1,), where each sequence's pieces start in ``ends``.
        ends: int32 .npy (documents,), where each piece ends in its sequence.
        trained: int32 .npy (sequences,), tokens that each sequence trains; None where there are no loss masks.
        checks: uint64 .npy (sequences,), see reader.sequence_check; None in stores of before it was written.
        visuals: int64 .npy (visuals, 10), images and videos, see store.visuals; None: the domain is text alone.
        visual_offsets: int64 .npy (sequences + 1,), where each sequence's visuals start in ``visuals``.
    """

    sequences: int
    documents: int
    tokens: int
    trained_tokens: int
    padding: int
    shards: tuple[Shard, ...]
    offsets: StoredFile
    ends: StoredFile
    trained: StoredFile | None = None
    checks: StoredFile | None = None
    visuals: StoredFile | None = None
    visual_offsets: StoredFile | None = None

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """Every file of the domain."""
        beside = [stored for shard in self.shards for stored in (shard.mask, shard.media) if stored is not None]
        others = [stored for name in _OPTIONAL if (stored := getattr(self, name)) is not None]
        return (*self.shards, *beside, self.offsets, self.ends, *others)


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json, beside its fingerprint.

    Attributes:
        sequence_length: tokens of every sequence.
        tokenizer: see describe_tokenizer.
        domains: name -> what it holds.
        accounting: domain -> what became of its tokens.
        sources: what the documents were read from, as prepare.py describes it; None: not known.
        token_dtype: of the token files: ``<u2`` or ``<u4``.
        version: of the format.
        special_tokens: of the documents, as prepare.py made them: whether they begin with ``bos`` and end with ``eos``,
            and ``eos_left_off``, those without an EOS that the tokenizer's own encode puts. None: not known. It is no
            part of the fingerprint, so that equal tokens have one, whichever version wrote them.
    """

    sequence_length: int
    tokenizer: dict[str, Any]
    domains: dict[str, DomainInfo]
    accounting: dict[str, Any]
    sources: list[dict[str, Any]] | None = None
    token_dtype: str = "<u4"
    version: int = VERSION
    special_tokens: dict[str, Any] | None = None

    def content(self) -> dict[str, Any]:
        """The canonical content: what the fingerprint is taken of."""
        content = {"format": FORMAT, **asdict(self)}
        del content["special_tokens"]
        if self.version == 1:
            del content["token_dtype"]
        for domain in content["domains"].values():
            optional = [(domain, name) for name in _OPTIONAL]
            optional += [(shard, name) for shard in domain["shards"] for name in ("mask", "media")]
            for entry, key in optional:
                if entry[key] is None:
                    del entry[key]
        return content if self.sources is not None else {k: v for k, v in content.items() if k != "sources"}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical content, which names every file's SHA-256."""
        return sha256_text(canonical_json(self.content()))

    def to_json(self) -> str:
        """The text of manifest.json."""
        beside = {} if self.special_tokens is None else {"special_tokens": self.special_tokens}
        return json.dumps({**self.content(), **beside, "fingerprint": self.fingerprint}, indent=2) + "\n"


def stores_in(root: Path) -> list[Path]:
    """Stores that lie directly in a directory, as in the output of a preparation."""
    manifests = sorted(root.glob(f"*/{MANIFEST}"))
    return [path.parent for path in manifests if f'"{FORMAT}"' in path.read_text(encoding="utf-8")[:200]]


def read_manifest(root: Path) -> Manifest:
    """Read ``root``'s manifest and check that it is one, of this version, and as it was written.

    Raises:
        UserError: for a missing, torn, foreign, newer or altered manifest.
    """
    path = root / MANIFEST
    fix = "make one with data_prep/prepare.py"
    if not path.is_file():
        problem = "no such directory" if not root.is_dir() else f"it has no {MANIFEST}, so its writing never finished"
        if stores := stores_in(root):
            problem, fix = "it holds some", f"name one of {', '.join(map(str, stores))}"
        raise UserError(f"{root} is not a packed store: {problem}; {fix}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is torn: {error}; {fix}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a packed store (format is not {FORMAT!r}); {fix}")
    if content.get("version") not in READABLE:
        raise UserError(
            f"{path} has version {content.get('version')}, this code reads {' and '.join(map(str, READABLE))}; {fix}"
        )
    try:
        manifest = _parse(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} lacks or mistypes {error}; {fix}") from error
    if manifest.fingerprint != content.get("fingerprint"):
        raise UserError(f"{path} was altered: its fingerprint is not that of its content; {fix}")
    return manifest


def _parse(content: dict[str, Any]) -> Manifest:
    domains = {}
    for name, entry in content["domains"].items():
        if "clips" in entry:
            raise UserError(
                f"domain {name} has clips.npy, which is visuals.npy now; make the store again with prepare_video.py"
            )
        files = {key: StoredFile(**entry[key]) for key in ("offsets", "ends", *_OPTIONAL) if key in entry}
        shards = tuple(map(parse_shard, entry["shards"]))
        domains[check_domain_name(name)] = DomainInfo(**{**entry, **files, "shards": shards})
    token_dtype = content["token_dtype"] if content["version"] > 1 else "<u4"
    if token_dtype not in ("<u2", "<u4"):
        raise TypeError("'token_dtype'")
    return Manifest(
        content["sequence_length"],
        content["tokenizer"],
        domains,
        content["accounting"],
        content.get("sources"),
        token_dtype,
        content["version"],
        content.get("special_tokens"),
    )


def parse_shard(entry: dict[str, Any]) -> Shard:
    """A shard as JSON has it."""
    return Shard(**{**entry, **{name: StoredFile(**entry[name]) for name in ("mask", "media") if entry.get(name)}})


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type, little endian, that holds every token: uint16 up to 65,536 entries, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def check_domain_name(name: str) -> str:
    """``name``, or UserError where it cannot be a directory of a store."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in (TOKENIZER, MANIFEST):
        raise UserError(
            f"domain name {name!r} cannot be used; begin with a letter or digit, go on with letters, digits, "
            f"'_', '-' or '.', and avoid {TOKENIZER!r} and {MANIFEST!r}"
        )
    return name


def stored_path(root: Path, file: str) -> Path:
    """The path of a stored file, or UserError where it is absolute, has ``..`` or leads out of ``root``."""
    relative = PurePosixPath(file)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{root / MANIFEST} names {file!r}, which is not a path in the store; do not use it")
    return inside(root, file)
