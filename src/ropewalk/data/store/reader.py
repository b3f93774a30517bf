"""Packed stores, read by memory map: one, and several of them as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ropewalk.data.store.hashing import canonical_json, sha256_directory, sha256_text
from ropewalk.data.store.manifest import TOKENIZER, DomainInfo, StoredFile, read_manifest, stored_path
from ropewalk.data.store.visuals import COLUMNS, Visual, read_visual, stored_bytes, visual_row
from ropewalk.errors import UserError
from ropewalk.files import sha256_of


@dataclass(frozen=True)
class PackedSequence:
    """One sequence and the document pieces in it.

    Attributes:
        tokens: uint32 (sequence_length,).
        ends: int32 (n_documents,), where each piece ends; tokens after the last end are padding.
        loss_mask: bool (sequence_length,), False where a token must not be predicted; None: all are. The first
            token of a piece is never predicted, whatever its mask.
        visuals: images and videos behind its placeholder tokens, in their order.
    """

    tokens: NDArray[np.uint32]
    ends: NDArray[np.int32]
    loss_mask: NDArray[np.bool_] | None = None
    visuals: tuple[Visual, ...] = ()

    @property
    def trained_tokens(self) -> int:
        """Tokens that are predicted: of each piece all but the first, without those masked out."""
        if not len(self.ends):
            return 0
        if self.loss_mask is None:
            return int(self.ends[-1]) - len(self.ends)
        starts = np.concatenate([[0], self.ends[:-1]])
        return int(self.loss_mask[: self.ends[-1]].sum()) - int(self.loss_mask[starts].sum())


class PackedStore:
    """A packed store, open for reading: the manifest and sizes are read at once, data when asked for."""

    def __init__(self, path: str | Path) -> None:
        """Open the store at ``path``.

        Raises:
            UserError: for a directory that is not a store, an altered manifest, or a file of another size.
        """
        self.root = Path(path)
        self._manifest = read_manifest(self.root)
        for info in self.domains.values():
            for stored in info.files:
                self._check_size(stored)
        self._domains: dict[str, _Domain] = {}

    @property
    def sequence_length(self) -> int:
        """Tokens of every sequence."""
        return self._manifest.sequence_length

    @property
    def domains(self) -> dict[str, DomainInfo]:
        """Contents of each domain."""
        return self._manifest.domains

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical manifest, so of every token and boundary in the store."""
        return self._manifest.fingerprint

    @property
    def tokenizer(self) -> dict[str, object]:
        """``sha256``, ``vocab_size``, ``bos_id`` and ``eos_id`` (None: the tokenizer has none)."""
        return self._manifest.tokenizer

    @property
    def tokenizer_path(self) -> Path:
        """The directory of the tokenizer that the tokens are of."""
        return self.root / TOKENIZER

    @property
    def special_tokens(self) -> dict[str, object]:
        """Special tokens of its documents, see Manifest; empty: not known."""
        return self._manifest.special_tokens or {}

    @property
    def accounting(self) -> dict[str, dict[str, object]]:
        """Accounting of the tokens of each domain: ``tokens_in``, ``moved``, ``dropped``."""
        return self._manifest.accounting

    def read(self, domain: str, index: int) -> PackedSequence:
        """Sequence ``index`` of ``domain``; its arrays are copies.

        Raises:
            UserError: for a domain that the store does not have, or a sequence that is not as it was written (stores
                of before that was recorded are not checked).
            IndexError: for an index outside 0 .. sequences - 1.
        """
        return self._domain(domain).read(index)

    @property
    def sources(self) -> list[dict[str, object]] | None:
        """Sources that the documents were read from; None: not known."""
        return self._manifest.sources

    def has_loss_masks(self, domain: str) -> bool:
        """True if the sequences of ``domain`` have loss masks."""
        return self.domains[domain].trained is not None

    def visual_index(self, domain: str, index: int | None = None) -> NDArray[np.int64]:
        """Visuals of a sequence, or of all, int64 (visuals, 10); see store.visuals.COLUMNS. Reads no pixel."""
        return self._domain(domain).visual_index(index)

    def trained_tokens(self, domain: str, index: int) -> int:
        """Tokens that a sequence trains; see PackedSequence.trained_tokens. Reads the index, no token."""
        return self._domain(domain).trained_tokens(index)

    def document_ends(self, domain: str, index: int) -> NDArray[np.int32]:
        """End of each document of a sequence, int32 (documents,), tokens. Reads the index, no token."""
        return self._domain(domain).piece_ends(index)

    def piece_lengths(self, domain: str) -> NDArray[np.int64]:
        """Tokens of every document piece of a domain, int64 (documents,), in order. Reads the index, no token."""
        return self._domain(domain).piece_lengths()

    def longest_documents(self, domain: str) -> NDArray[np.int64]:
        """Tokens of the longest document piece of each sequence of a domain, int64 (sequences,); 0: it has none."""
        return self._domain(domain).longest_pieces()

    def verify(self) -> None:
        """Hash every file and check every boundary against the manifest.

        Raises:
            UserError: naming the first file that differs.
        """
        for name, info in self.domains.items():
            for stored in info.files:
                self._verify_file(stored)
            self._domain(name).check_boundaries()
        if sha256_directory(self.tokenizer_path) != self.tokenizer["sha256"]:
            raise UserError(f"{self.tokenizer_path} is not the tokenizer of this store; write the store again")

    def _verify_file(self, stored: StoredFile) -> None:
        if sha256_of(stored_path(self.root, stored.file)) != stored.sha256:
            raise UserError(f"{self.root / stored.file} is corrupt: its SHA-256 differs; write the store again")

    def _domain(self, name: str) -> _Domain:
        if name not in self._domains:
            if name not in self.domains:
                raise UserError(f"{self.root} has no domain {name!r}; it has: {', '.join(sorted(self.domains))}")
            dtype = np.dtype(self._manifest.token_dtype)
            self._domains[name] = _Domain(self.root, self.domains[name], self.sequence_length, dtype)
        return self._domains[name]

    def _check_size(self, stored: StoredFile) -> None:
        path = stored_path(self.root, stored.file)
        size = path.stat().st_size if path.is_file() else None
        if size != stored.bytes:
            state = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"{path} {state}, its manifest says {stored.bytes}; copy or write the store again")


def sequence_check(
    tokens: NDArray[Any], mask: NDArray[np.uint8] | None, ends: NDArray[np.int32], visuals: Sequence[Visual] = ()
) -> int:
    """64 bits of xxh3 over the tokens of a sequence, its packed mask, its ends and its visuals, each as it is stored.

    Cheap enough to be compared whenever a sequence is read.
    """
    digest = xxhash.xxh3_64(np.ascontiguousarray(tokens).data)
    if mask is not None:
        digest.update(np.ascontiguousarray(mask).data)
    digest.update(np.ascontiguousarray(ends, dtype="<i4").data)
    for visual in visuals:
        digest.update(np.array(visual_row(visual, 0), dtype="<i8").data)
        digest.update(stored_bytes(visual))
    return digest.intdigest()


class _Domain:
    """The mapped files of one domain."""

    def __init__(self, root: Path, info: DomainInfo, sequence_length: int, dtype: np.dtype[Any]) -> None:
        self._root = root
        self._dtype = dtype
        self._info = info
        self._length = sequence_length
        self._first = list(accumulate((shard.sequences for shard in info.shards), initial=0))
        self._shards: dict[int, NDArray[Any]] = {}
        self._masks: dict[int, NDArray[np.uint8]] = {}
        self._media: dict[int, NDArray[np.uint8]] = {}

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        return self._load(self._info.offsets)

    @cached_property
    def _ends(self) -> NDArray[np.int32]:
        return self._load(self._info.ends)

    @cached_property
    def _trained(self) -> NDArray[np.int32] | None:
        return None if self._info.trained is None else self._load(self._info.trained)

    @cached_property
    def _checks(self) -> NDArray[np.uint64] | None:
        return None if self._info.checks is None else self._load(self._info.checks)

    @cached_property
    def _visuals(self) -> NDArray[np.int64]:
        return np.empty((0, len(COLUMNS)), np.int64) if self._info.visuals is None else self._load(self._info.visuals)

    @cached_property
    def _visual_offsets(self) -> NDArray[np.int64]:
        stored = self._info.visual_offsets
        return np.zeros(self._info.sequences + 1, np.int64) if stored is None else self._load(stored)

    def visual_index(self, index: int | None) -> NDArray[np.int64]:
        if index is None:
            return self._visuals
        self._check_index(index)
        return self._visuals[self._visual_offsets[index] : self._visual_offsets[index + 1]]

    def _load(self, stored: StoredFile) -> NDArray[Any]:
        return np.load(stored_path(self._root, stored.file), mmap_mode="r", allow_pickle=False)

    def trained_tokens(self, index: int) -> int:
        ends = self.piece_ends(index)
        if self._trained is not None:
            return int(self._trained[index])
        return int(ends[-1]) - len(ends) if len(ends) else 0

    def piece_ends(self, index: int) -> NDArray[np.int32]:
        self._check_index(index)
        return self._ends[self._offsets[index] : self._offsets[index + 1]]

    def read(self, index: int) -> PackedSequence:
        self._check_index(index)
        number = bisect_right(self._first, index) - 1
        shard, row = self._info.shards[number], index - self._first[number]
        if number not in self._shards:
            self._shards[number] = self._map(shard.file, self._dtype, (shard.sequences, self._length))
            if shard.mask is not None:
                shape = shard.sequences, (self._length + 7) // 8  # a bit a token
                self._masks[number] = self._map(shard.mask.file, np.dtype(np.uint8), shape)
        tokens, ends = self._shards[number][row], np.array(self.piece_ends(index))
        packed = self._masks[number][row] if number in self._masks else None
        try:
            visuals = tuple(read_visual(entry, self._media_of(number)) for entry in self.visual_index(index))
            is_whole = self._checks is None or sequence_check(tokens, packed, ends, visuals) == int(self._checks[index])
        except ValueError:  # the index of visuals names bytes that are not there
            is_whole = False
        if not is_whole:
            raise UserError(
                f"{self._root / shard.file} or a file beside it is corrupt: sequence {index} is not as it was written; "
                "copy or write the store again"
            )
        mask = None if packed is None else np.unpackbits(packed, count=self._length).view(np.bool_)
        return PackedSequence(np.array(tokens, dtype=np.uint32), ends, mask, visuals)

    def _media_of(self, number: int) -> NDArray[np.uint8]:
        media = self._info.shards[number].media
        if media is None:
            raise ValueError
        if number not in self._media:
            self._media[number] = np.memmap(stored_path(self._root, media.file), np.uint8, mode="r")
        return self._media[number]

    def _map(self, file: str, dtype: np.dtype[Any], shape: tuple[int, int]) -> NDArray[Any]:
        return np.memmap(stored_path(self._root, file), dtype, mode="r", shape=shape)

    def piece_lengths(self) -> NDArray[np.int64]:
        ends, first = np.asarray(self._ends), self._first_pieces
        lengths = np.diff(ends, prepend=ends.dtype.type(0))
        lengths[first] = ends[first]
        return lengths.astype(np.int64)

    def longest_pieces(self) -> NDArray[np.int64]:
        longest = np.zeros(self._info.sequences, np.int64)
        longest[np.diff(self._offsets) > 0] = np.maximum.reduceat(self.piece_lengths(), self._first_pieces)
        return longest

    @property
    def _first_pieces(self) -> NDArray[np.int64]:
        """The number of the first piece of each sequence that has any."""
        offsets = np.asarray(self._offsets)
        first: NDArray[np.int64] = offsets[:-1][np.diff(offsets) > 0]
        return first

    def check_boundaries(self) -> None:
        offsets, ends = np.asarray(self._offsets), np.asarray(self._ends)
        whole = (
            len(offsets) == self._info.sequences + 1
            and len(ends) == self._info.documents
            and offsets[0] == 0
            and offsets[-1] == len(ends)
            and bool(np.all(np.diff(offsets) >= 0))
            and bool(np.all(self.piece_lengths() > 0))
            and bool(np.all(ends <= self._length))
            and (self._trained is None or int(self._trained.sum()) == self._info.trained_tokens)
            and int(self._visual_offsets[-1]) == len(self._visuals)
            and bool(np.all(np.diff(self._visual_offsets) >= 0))
        )
        if not whole:
            file = self._root / self._info.ends.file
            raise UserError(f"{file} does not hold the boundaries of its sequences; write the store again")

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self._info.sequences:
            raise IndexError(f"sequence {index} is outside 0 .. {self._info.sequences - 1}")


class JoinedStore:
    """The domains of one or several stores: those of the store named "" as they are, others as ``NAME/DOMAIN``.

    What a store holds is a row here: a training sequence is made of ``rows(domain)`` of them, one after the other,
    every document boundary kept.
    """

    def __init__(self, stores: PackedStore | Mapping[str, PackedStore], sequence_length: int | None = None) -> None:
        """Join stores.

        Args:
            stores: one, or several by name.
            sequence_length: tokens of a training sequence; None: the longest of the stores'.

        Raises:
            UserError: for no store, a length that does not divide ``sequence_length``, or stores of two tokenizers.
        """
        self.stores = dict(stores) if isinstance(stores, Mapping) else {"": stores}
        if not self.stores:
            raise UserError("stores={} holds nothing to draw from; name at least one packed store")
        self.sequence_length = sequence_length or max(store.sequence_length for store in self.stores.values())
        first = next(iter(self.stores.values()))
        for store in self.stores.values():
            if self.sequence_length % store.sequence_length:
                raise UserError(
                    f"data.sequence_length={self.sequence_length}, but {store.root} holds sequences of "
                    f"{store.sequence_length} tokens, which do not divide it; set data.sequence_length to a multiple "
                    f"of {store.sequence_length} or name another store"
                )
            if store.tokenizer["sha256"] != first.tokenizer["sha256"] and _tokens(store) != _tokens(first):
                raise UserError(
                    f"{store.root} holds tokens of another tokenizer than {first.root} (sha256 "
                    f"{store.tokenizer['sha256']}, not {first.tokenizer['sha256']}); prepare both with one"
                )
        self._stores = {
            f"{name}/{domain}" if name else domain: (store, domain)
            for name, store in self.stores.items()
            for domain in store.domains
        }

    @property
    def domains(self) -> dict[str, DomainInfo]:
        """Contents of each domain; ``sequences`` are rows."""
        return {name: store.domains[domain] for name, (store, domain) in self._stores.items()}

    @property
    def fingerprint(self) -> str:
        """That of the store where there is one, else SHA-256 of all names and fingerprints."""
        if list(self.stores) == [""]:
            return self.stores[""].fingerprint
        return sha256_text(canonical_json({name: store.fingerprint for name, store in self.stores.items()}))

    def rows(self, domain: str) -> int:
        """Rows of ``domain`` that make up one training sequence."""
        return self.sequence_length // self._store_of(domain)[0].sequence_length

    def read(self, domain: str, row: int) -> PackedSequence:
        """One row, of its store's length; see PackedStore.read."""
        store, name = self._store_of(domain)
        return store.read(name, row)

    def visual_index(self, domain: str, row: int | None = None) -> NDArray[np.int64]:
        """Visuals of a row, or of all rows of a domain; see PackedStore.visual_index."""
        store, name = self._store_of(domain)
        return store.visual_index(name, row)

    @property
    def has_visuals(self) -> bool:
        """True if any domain holds images or videos."""
        return any(info.visuals is not None for info in self.domains.values())

    def trained_tokens(self, domain: str, row: int) -> int:
        """Tokens that a row trains; see PackedStore.trained_tokens."""
        store, name = self._store_of(domain)
        return store.trained_tokens(name, row)

    def document_ends(self, domain: str, row: int) -> NDArray[np.int32]:
        """End of each document of a row; see PackedStore.document_ends."""
        store, name = self._store_of(domain)
        return store.document_ends(name, row)

    def longest_documents(self, domain: str) -> NDArray[np.int64]:
        """Tokens of the longest document of each row of a domain; see PackedStore.longest_documents."""
        store, name = self._store_of(domain)
        return store.longest_documents(name)

    def attention_cost(self, domain: str, row: int) -> int:
        """Sum of the squared lengths of a row's documents, as attention without a window computes it."""
        lengths = self.document_lengths(domain, row)
        return int(lengths @ lengths)

    def document_lengths(self, domain: str, row: int) -> NDArray[np.int64]:
        """Tokens of each document of a row, its padding, which may be of no token, counted as one."""
        store, name = self._store_of(domain)
        ends = store.document_ends(name, row)
        bounds = np.concatenate([[0], ends, [store.sequence_length]]).astype(np.int64)
        return bounds[1:] - bounds[:-1]

    def _store_of(self, domain: str) -> tuple[PackedStore, str]:
        if domain not in self._stores:
            raise UserError(f"the store has no domain {domain!r}; it has: {', '.join(sorted(self._stores))}")
        return self._stores[domain]


def _tokens(store: PackedStore) -> dict[str, Any]:
    """The meaning of tokens in a store, whichever chat template lies with them."""
    file = store.tokenizer_path / "tokenizer.json"
    return {**store.tokenizer, "sha256": sha256_of(file) if file.is_file() else store.tokenizer["sha256"]}
