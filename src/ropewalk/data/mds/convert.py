"""Published MDS directories to a packed store and back: ``python data_prep/convert_mds.py``."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.config.data import ConvertConfig
from ropewalk.config.rules import one_of
from ropewalk.data.mds.mds_reader import INDEX, MdsDataset, MdsShard, open_mds
from ropewalk.data.mds.mds_writer import write_mds
from ropewalk.data.prepare.pipeline import Processes
from ropewalk.data.store.hashing import canonical_json, sha256_text
from ropewalk.data.store.manifest import MANIFEST, TOKENIZER
from ropewalk.data.store.reader import PackedSequence, PackedStore
from ropewalk.data.store.tokenizer_files import copy_tokenizer, open_tokenizer
from ropewalk.data.store.writer import Accounting, PartWriter, clear_records, commit_store
from ropewalk.errors import UserError
from ropewalk.files import is_in_use, only_writer, read_object, write_atomically, writing

CONVERTING = "converting.json"  # what a store in the making is made of


def convert(config: ConvertConfig) -> Path:
    """Convert in the direction that ``config.format`` names; see the two functions for what each does.

    Raises:
        UserError: for a wrong configuration or source, before anything is written.
    """
    one_of("format", config.format, ("packed", "mds"))
    return to_packed(config) if config.format == "packed" else to_mds(config)


def to_packed(config: ConvertConfig) -> Path:
    """MDS directories, one a domain, as a packed store: one token file for each MDS shard.

    Shards are converted by ``config.workers`` processes, one at a time in memory each. A call that was killed goes on
    with the shards that are missing; the bytes do not depend on the number of processes or calls.

    Raises:
        UserError: for a source that is no MDS directory or has no ProLong columns, an output that holds something
            else, or a sequence that does not fit, naming it.
    """
    root = Path(config.output)
    sources = _open_sources(config)
    if not config.tokenizer:
        raise UserError("tokenizer is not set; name the tokenizer directory or hub id that the tokens are of")
    if _is_converted(root, sources):
        _clear(root, sources)
        print(f"{root} holds this store already", flush=True)
        return root

    def need() -> int:
        return sum(shard.raw_data.bytes for dataset in sources.values() for shard in dataset.shards)

    with writing(f"output={root}", root, need), only_writer(root, f"output={root}"):
        _begin(root, config, sources)
        _convert(root, config, sources)
    return root


def _convert(root: Path, config: ConvertConfig, sources: Mapping[str, MdsDataset]) -> None:
    assert config.tokenizer is not None
    tokenizer = _save_tokenizer(root, config.tokenizer)
    writers = {name: PartWriter(root, name, config.sequence_length, tokenizer["vocab_size"]) for name in sources}
    shards = [(writers[name], *entry) for name, dataset in sources.items() for entry in enumerate(dataset.shards)]
    todo = [(writer, number, shard) for writer, number, shard in shards if writer.finished(number) is None]
    print(f"{root}: {len(todo)} shards to convert, {len(shards) - len(todo)} finished before", flush=True)
    with Processes(config.workers) as processes:
        for count, (index, _) in enumerate(processes.each(_convert_shard, todo), start=1):
            writer, number, _ = todo[index]
            print(f"{writer.domain}, shard {number}: {count} of {len(todo)}", flush=True)
    assembled = {name: writer.assemble_recorded(len(sources[name].shards)) for name, writer in writers.items()}
    domains = {name: domain for name, (domain, _) in assembled.items()}
    accounts = {name: account for name, (_, account) in assembled.items()}
    store = commit_store(root, config.sequence_length, tokenizer, domains, accounts)
    _clear(root, sources)
    for name, info in store.domains.items():
        print(f"{name}: {info.sequences:,} sequences, {info.documents:,} documents, {info.tokens:,} tokens", flush=True)


def _clear(root: Path, domains: Iterable[str]) -> None:
    """Remove from a store what was needed to write it, also where a killed call left it."""
    for name in domains:
        clear_records(root / name)
    (root / CONVERTING).unlink(missing_ok=True)


def packed_sequence(sample: Mapping[str, Any], sequence_length: int) -> PackedSequence:
    """A sample with ProLong's columns as a sequence of the store.

    Args:
        sample: ``input_ids``; ``indices`` (n x 2, [start, end) of each document piece; without it the sequence is one
            piece); ``mask`` (0: the token is not trained; without it every token is).
        sequence_length: tokens; a shorter sample is padded.

    Raises:
        UserError: for a sample that is longer, has negative tokens, pieces that do not follow each other from its
            first token to its last, or a mask of another length.
    """
    ids = np.asarray(sample["input_ids"])
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 1 <= len(ids) <= sequence_length:
        raise UserError(f"input_ids of shape {ids.shape} must be one row of 1 to {sequence_length} integers")
    if sample.get("length", len(ids)) != len(ids):
        raise UserError(f"length={sample['length']}, but there are {len(ids)} input_ids")
    if ids.dtype.kind == "i" and int(ids.min()) < 0:
        raise UserError(f"token {int(ids.min())} is negative")
    ends = _ends(sample, len(ids))
    tokens = np.zeros(sequence_length, dtype=np.uint32)
    tokens[: len(ids)] = ids
    if "mask" not in sample:
        return PackedSequence(tokens, ends)
    mask = np.asarray(sample["mask"])
    if mask.shape != ids.shape:
        raise UserError(f"mask of shape {mask.shape} must have an entry for each of the {len(ids)} input_ids")
    loss_mask = np.zeros(sequence_length, dtype=np.bool_)
    loss_mask[: len(ids)] = mask != 0
    return PackedSequence(tokens, ends, loss_mask)


def _ends(sample: Mapping[str, Any], tokens: int) -> NDArray[np.int32]:
    if "indices" not in sample:
        return np.array([tokens], dtype=np.int32)
    indices = np.asarray(sample["indices"], dtype=np.int64).reshape(-1, 2)
    follow = np.array_equal(indices[:, 0], np.concatenate([[0], indices[:-1, 1]]))
    if not len(indices) or not follow or indices[-1, 1] != tokens or np.any(indices[:, 1] <= indices[:, 0]):
        raise UserError(
            f"indices {indices.tolist()[:4]}... do not follow each other from token 0 to {tokens}; each must start "
            "where the one before ends"
        )
    return indices[:, 1].astype(np.int32)


def to_mds(config: ConvertConfig) -> Path:
    """A packed store as MDS directories, one a domain, with ProLong's columns.

    Raises:
        UserError: for a store that is none, or an output that has files.
    """
    if not config.store:
        raise UserError("store is not set; name the packed store to convert: store=DIR")
    store, root = PackedStore(config.store), Path(config.output)
    if pictured := [name for name, info in store.domains.items() if info.visuals is not None]:
        raise UserError(
            f"store={config.store}: {', '.join(pictured)} hold images or videos, which ProLong's columns have no place "
            "for; convert a store of text"
        )
    for name, info in store.domains.items():
        if (root / name / INDEX).is_file():
            print(f"{root / name} is finished already", flush=True)
            continue
        need = partial(int, store.sequence_length * info.sequences * 4)
        with writing(f"output={root}", root, need), only_writer(root, f"output={root}"):
            write_mds(root / name, _samples(store, name, info.sequences))
        print(f"{root / name}: {info.sequences:,} sequences", flush=True)
    return root


def _samples(store: PackedStore, domain: str, sequences: int) -> Iterator[dict[str, Any]]:
    for index in range(sequences):
        sequence = store.read(domain, index)
        ends = sequence.ends.astype(np.uint32)
        starts = np.concatenate([np.zeros(1, np.uint32), ends[:-1]])
        ids = sequence.tokens[: ends[-1]]
        sample = {"input_ids": ids, "indices": np.stack([starts, ends], 1), "length": len(ids), "domain": domain}
        if sequence.loss_mask is not None:
            sample["mask"] = sequence.loss_mask[: ends[-1]].astype(np.uint8)
        yield sample


def _open_sources(config: ConvertConfig) -> dict[str, MdsDataset]:
    if not config.sources:
        raise UserError(
            "sources is empty; name a directory for each domain, '++sources={books: DIR}', or +mds=prolong_64k"
        )
    opened = {}
    for name, directory in config.sources.items():
        dataset = opened[name] = open_mds(Path(config.root) / directory, verify=config.verify)
        if "input_ids" not in dataset.columns:
            raise UserError(f"{dataset.root} has no column input_ids; it has: {', '.join(dataset.columns)}")
    return opened


def _is_converted(root: Path, sources: Mapping[str, MdsDataset]) -> bool:
    """True if the store is whole already.

    Raises:
        UserError: where it is a store of other sources.
    """
    if not (root / MANIFEST).is_file():
        return False
    counts = {name: info.sequences for name, info in PackedStore(root).domains.items()}
    if counts != {name: len(dataset) for name, dataset in sources.items()}:
        raise UserError(f"output={root} is a packed store of other sources; remove it or name another directory")
    return True


def _begin(root: Path, config: ConvertConfig, sources: Mapping[str, MdsDataset]) -> None:
    """Mark the output as this conversion's.

    Raises:
        UserError: where the output holds another conversion, or files that are not this command's.
    """
    work = {
        "sequence_length": config.sequence_length,
        "tokenizer": config.tokenizer,
        "sources": {
            name: sha256_text((dataset.root / INDEX).read_text(encoding="utf-8")) for name, dataset in sources.items()
        },
    }
    mark = root / CONVERTING
    if mark.is_file() and read_object(mark) != work:
        raise UserError(f"output={root} holds the beginning of another conversion; remove it or name another one")
    if not mark.is_file() and is_in_use(root):
        raise UserError(f"output={root} has files that are not this command's; name another directory")
    write_atomically(mark, canonical_json(work) + "\n")


def _save_tokenizer(root: Path, name: str) -> dict[str, Any]:
    if Path(name).is_dir():
        return copy_tokenizer(Path(name), root / TOKENIZER)
    scratch = root / "hub-tokenizer"
    open_tokenizer(name).save_pretrained(scratch)
    description = copy_tokenizer(scratch, root / TOKENIZER)
    shutil.rmtree(scratch)
    return description


def _convert_shard(writer: PartWriter, number: int, shard: MdsShard) -> None:
    data = shard.load()

    def sequences() -> Iterator[PackedSequence]:
        for index in range(shard.samples):
            try:
                yield packed_sequence(shard.sample(data, index), writer.sequence_length)
            except ValueError as error:
                raise UserError(f"sample {index} of {shard.directory / shard.raw_data.basename}: {error}") from error

    try:
        part = writer.write(number, sequences())
    except ValueError as error:
        raise UserError(f"sources.{writer.domain}: {error}") from error
    writer.record(number, part, Accounting(part.tokens))
