"""Packed stores behind a URL: s3://, gs://, hf://, file:// and whatever else fsspec reads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, BinaryIO

from ropewalk.config.rules import STORE_FIX, existing_directory, is_remote
from ropewalk.config.train import DataConfig
from ropewalk.data.store.cache import BOUNDED, DownloadCache
from ropewalk.data.store.hashing import sha256_directory, sha256_text
from ropewalk.data.store.manifest import MANIFEST, TOKENIZER, DomainInfo, StoredFile, read_manifest, stored_path
from ropewalk.data.store.reader import PackedSequence, PackedStore, _Domain
from ropewalk.errors import UserError
from ropewalk.files import replace_atomically, sha256_of


def open_stores(config: DataConfig) -> dict[str, PackedStore]:
    """The stores of a configuration by name: ``data.store`` under "", those of ``data.stores`` under theirs.

    Raises:
        UserError: for a store that is none or, with ``data.verify``, is not as it was written; a ``data.store`` of
            another sequence length.
    """
    stores = {"": open_store("data.store", config.store, config)}
    stores |= {name: open_store(f"data.stores.{name}", where, config) for name, where in config.stores.items()}
    if stores[""].sequence_length != config.sequence_length:
        raise UserError(
            f"data.sequence_length={config.sequence_length}, but {config.store} holds sequences of "
            f"{stores[''].sequence_length} tokens; set data.sequence_length={stores[''].sequence_length} or name "
            "another store"
        )
    if config.verify:
        for store in stores.values():
            store.verify()
    return stores


def open_store(name: str, where: str, config: DataConfig) -> PackedStore:
    """The store at ``where``, a directory or a URL, for the configuration's entry ``name``."""
    if not is_remote(where):
        return PackedStore(existing_directory(name, where, STORE_FIX))
    assert config.cache_dir is not None  # validated
    return RemoteStore(where, DownloadCache(config.cache_dir, int(config.cache_gib * 2**30)))


class RemoteStore(PackedStore):
    """A packed store that is copied from a URL as it is read.

    Manifest, tokenizer and index are copied when it is opened, token files when a sequence of theirs is first read;
    each is checked against the manifest's size and SHA-256 before it is used. Token files are deleted again when the
    cache needs room: where it cannot hold the whole store, the random order makes it copy the same files over and
    over, so give it room for all of it or write the store with smaller shards.
    """

    def __init__(self, url: str, cache: DownloadCache) -> None:
        """Open the store at ``url``.

        Raises:
            UserError: for a URL of an unknown or uninstalled protocol, one that holds no store, or a file that is not
                as the manifest says.
        """
        self.url = url.rstrip("/")
        self.cache = cache
        self._files, self._base = _filesystem(self.url)
        self._open = threading.Lock()  # the training thread reads the index while a background one reads tokens
        self.root = self._copy_manifest()
        self._manifest = read_manifest(self.root)
        self._domains: dict[str, _Domain] = {}
        for info in self.domains.values():
            for stored in info.files:
                if not stored.file.endswith(BOUNDED):
                    self._fetch(stored)
        self._copy_tokenizer()

    def read(self, domain: str, index: int) -> PackedSequence:
        """See PackedStore.read; the file that holds the sequence is copied where it is not in the cache."""
        info = self._domain(domain)._info
        while True:
            if any([self._fetch(stored) for stored in _files_of_row(info, index)]):
                with self._open:
                    self._domains.clear()  # lets go of deleted files, which keep their space while they are mapped
            try:
                return super().read(domain, index)
            except FileNotFoundError:  # deleted by another process before it was opened
                continue

    def _verify_file(self, stored: StoredFile) -> None:
        """Copy a file that is not in the cache, which hashes it; one that differs is deleted from the cache."""
        path = self.root / stored.file
        if not self._fetch(stored) and sha256_of(path) != stored.sha256:
            path.unlink()
            raise UserError(f"{path} was corrupt: its SHA-256 differed; it is deleted, so start again")

    def _domain(self, name: str) -> _Domain:
        with self._open:
            return super()._domain(name)

    def _fetch(self, stored: StoredFile) -> bool:
        stored_path(self.root, stored.file)  # stays inside
        name = str((self.root / stored.file).relative_to(self.cache.directory))
        source = f"{self.url}/{stored.file}"
        return self.cache.fetch(name, stored.bytes, stored.sha256, source, lambda: self._reader(stored.file))

    def _reader(self, file: str) -> BinaryIO:
        return self._files.open(f"{self._base}/{file}", "rb")

    def _copy_manifest(self) -> Path:
        """Keep the manifest as it is now, in a directory named by its content."""
        try:
            text = self._files.cat_file(f"{self._base}/{MANIFEST}").decode("utf-8")
        except FileNotFoundError:
            raise UserError(
                f"{self.url} is not a packed store: it has no {MANIFEST}; copy a finished store there, that file last"
            ) from None
        key = sha256_text(text)[:32]
        root = self.cache.directory / key
        with self.cache.locked(key):
            root.mkdir(exist_ok=True)
            if not (root / MANIFEST).exists():
                replace_atomically(root / MANIFEST, lambda path: path.write_text(text, encoding="utf-8", newline=""))
        return root

    def _copy_tokenizer(self) -> None:
        expected = self.tokenizer["sha256"]
        with self.cache.locked(f"{self.root.name}/{TOKENIZER}"):
            self.tokenizer_path.mkdir(exist_ok=True)
            if sha256_directory(self.tokenizer_path) == expected:
                return
            for path in self._files.ls(f"{self._base}/{TOKENIZER}", detail=False):
                name = path.rstrip("/").rsplit("/", 1)[-1]
                (self.tokenizer_path / name).write_bytes(self._files.cat_file(path))
            if sha256_directory(self.tokenizer_path) != expected:
                raise UserError(
                    f"{self.url}/{TOKENIZER} is not the tokenizer that its manifest names; copy the store there again"
                )


def _files_of_row(info: DomainInfo, index: int) -> list[StoredFile]:
    """The token file that holds sequence ``index``, its masks and its media if any; none for an index outside."""
    for shard in info.shards:
        if 0 <= index < shard.sequences:
            return [stored for stored in (shard, shard.mask, shard.media) if stored is not None]
        index -= shard.sequences
    return []


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, base = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} needs a package that is not installed: {error} (pip install '.[remote]')") from error
    except ValueError as error:
        raise UserError(f"{url} cannot be read: {error}; use s3://, gs://, hf://, file:// or a directory") from error
    return files, base
