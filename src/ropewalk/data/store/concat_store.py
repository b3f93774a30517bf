"""Several packed stores read as one, their sequence lengths dividing the length that is trained at."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.store.hashing import canonical_json, sha256_text
from ropewalk.data.store.manifest import DomainInfo
from ropewalk.data.store.reader import PackedSequence, PackedStore
from ropewalk.errors import UserError


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
            if store.tokenizer["sha256"] != first.tokenizer["sha256"]:
                raise UserError(
                    f"{store.root} holds tokens of another tokenizer than {first.root} (sha256 "
                    f"{store.tokenizer['sha256']}, not {first.tokenizer['sha256']}); prepare both with one"
                )
        self._places = {
            f"{name}/{domain}" if name else domain: (store, domain)
            for name, store in self.stores.items()
            for domain in store.domains
        }

    @property
    def domains(self) -> dict[str, DomainInfo]:
        """Contents of each domain; ``sequences`` are rows."""
        return {name: store.domains[domain] for name, (store, domain) in self._places.items()}

    @property
    def fingerprint(self) -> str:
        """That of the store where there is one, else SHA-256 of all names and fingerprints."""
        if list(self.stores) == [""]:
            return self.stores[""].fingerprint
        return sha256_text(canonical_json({name: store.fingerprint for name, store in self.stores.items()}))

    def rows(self, domain: str) -> int:
        """Rows of ``domain`` that make up one training sequence."""
        return self.sequence_length // self._place(domain)[0].sequence_length

    def read(self, domain: str, row: int) -> PackedSequence:
        """One row, of its store's length; see PackedStore.read."""
        store, name = self._place(domain)
        return store.read(name, row)

    def trained_tokens(self, domain: str, row: int) -> int:
        """Tokens that a row trains; see PackedStore.trained_tokens."""
        store, name = self._place(domain)
        return store.trained_tokens(name, row)

    def document_ends(self, domain: str, row: int) -> NDArray[np.int32]:
        """End of each document of a row; see PackedStore.document_ends."""
        store, name = self._place(domain)
        return store.document_ends(name, row)

    def attention_cost(self, domain: str, row: int) -> int:
        """Sum of the squared lengths of a row's documents, padding counted as one, as attention computes it."""
        store, name = self._place(domain)
        ends = store.document_ends(name, row)
        bounds = np.concatenate([[0], ends, [store.sequence_length]]).astype(np.int64)
        lengths: NDArray[np.int64] = np.diff(bounds)
        return int(lengths @ lengths)

    def _place(self, domain: str) -> tuple[PackedStore, str]:
        if domain not in self._places:
            raise UserError(f"the store has no domain {domain!r}; it has: {', '.join(sorted(self._places))}")
        return self._places[domain]
