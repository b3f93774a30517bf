"""Contents of a packed store, for people: ``python data_prep/inspect_store.py store=DIR``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from ropewalk.config.data import InspectStoreConfig
from ropewalk.data.store.manifest import MANIFEST, DomainInfo, stores_in
from ropewalk.data.store.reader import PackedSequence, PackedStore
from ropewalk.data.store.tokenizer_files import open_tokenizer
from ropewalk.data.store.visuals import COLUMNS
from ropewalk.errors import UserError
from ropewalk.files import replace_atomically

BAR = 40  # characters of the fullest bar
EXCERPT = 60  # characters of text shown at either end of a piece


def print_store(config: InspectStoreConfig) -> None:
    """Print counts, lengths of document pieces, where tokens went, and one sequence decoded with its boundaries.

    Of a sequence with a loss mask each stretch that is trained is printed too. A directory of stores is listed, and
    ``verify`` is of each of them.

    Raises:
        UserError: for a directory that is not a store, a domain or sequence that it does not have, or, with ``verify``,
            a file that is not as it was written.
    """
    root = Path(config.store)
    inside = [] if (root / MANIFEST).is_file() else stores_in(root)
    stores = [PackedStore(path) for path in inside or [root]]
    if config.verify:
        for store in stores:
            store.verify()
    for line in domain_table(stores) if inside else describe(stores[0], config.domain, config.sequence):
        print(line, flush=True)
    if config.figures:
        _write_census(length_census(stores), Path(config.figures), named=bool(inside))
    if config.verify:
        print("verified: every file has the size and SHA-256 of the manifest")
    if inside:
        print(f"{root} holds {len(inside)} stores; look into one with store={inside[-1]}")


def describe(store: PackedStore, domain: str | None, sequence: int) -> Iterator[str]:
    """The lines that print_store prints."""
    tokenizer = store.tokenizer
    yield f"{store.root}: sequences of {store.sequence_length:,} tokens, fingerprint {store.fingerprint}"
    yield f"tokenizer: {tokenizer['vocab_size']:,} entries, sha256 {tokenizer['sha256']}"
    if special := store.special_tokens:
        left_off = f", own EOS left off {special['eos_left_off']:,} times" if special["eos_left_off"] else ""
        framing = (f"{'with' if special[name] else 'without'} {name.upper()}" for name in ("bos", "eos"))
        yield f"documents: begin {next(framing)}, end {next(framing)}{left_off}"
    yield ""
    yield from domain_table([store], named=False)
    for name, info in store.domains.items():
        yield from ("", *_accounting(store, name, info), *_histogram(store, name, info))
        if info.visuals is not None:
            index = dict(zip(COLUMNS, store.visual_index(name).T, strict=True))
            tokens = int((index["frames"] * index["height"] * index["width"]).sum())
            yield f"  {len(index['frames']):,} images and videos of {tokens:,} tokens"
    shown = domain or next(name for name, info in store.domains.items() if info.sequences)
    yield from ("", *_decoded(store, shown, sequence))


def domain_table(stores: Sequence[PackedStore], named: bool = True) -> Iterator[str]:
    """The lines of a table of the domains of stores, the store's name first if ``named``; see fill."""
    header = f"{'domain':<20}{'sequences':>12}{'pieces':>12}{'tokens':>18}{'trained':>18}{'fill':>10}"
    yield f"{'store':<14}{header}" if named else header
    for store in stores:
        for name, info in store.domains.items():
            row = (
                f"{name:<20}{info.sequences:>12,}{info.documents:>12,}{info.tokens:>18,}{info.trained_tokens:>18,}"
                f"{fill(info):>10}"
            )
            yield f"{store.root.name:<14}{row}" if named else row


def next_commands(stores: Sequence[PackedStore], output: Path) -> Iterator[str]:
    """The commands that look at the stores of a preparation and train on them."""
    store = max(stores, key=lambda store: store.sequence_length)
    sequences = {name: info.sequences for name, info in store.domains.items() if info.sequences}
    shares = ", ".join(f"{name}: {count / sum(sequences.values()):.3g}" for name, count in sequences.items())
    heldout = output / "heldout"
    words = ["data=packed", _override("data.store", store.root), f"data.sequence_length={store.sequence_length}"]
    words += [f"data.mixture={{{shares}}}"]
    words += [_override("evaluation.documents", heldout)] if heldout.is_dir() else []
    yield f"next: python data_prep/inspect_store.py {shlex.quote(f'store={store.root}')}"
    yield f"next: python train.py {shlex.join(words)}"


def _override(key: str, path: Path) -> str:
    """An override whose path Hydra reads as it is, whatever is in it."""
    is_plain = re.fullmatch(r"[\w./:@%+-]+", str(path), re.ASCII)
    return f"{key}={path}" if is_plain else f'{key}="{path}"'


def fill(info: DomainInfo) -> str:
    """Share of the tokens of a domain that are not padding, as text."""
    return f"{info.tokens / max(info.tokens + info.padding, 1):.2%}"


def _accounting(store: PackedStore, name: str, info: DomainInfo) -> Iterator[str]:
    account = store.accounting[name]
    yield f"{name}: {account['tokens_in']:,} tokens came in, {info.tokens:,} packed"
    for kind in ("moved", "dropped"):
        counts = account[kind]
        assert isinstance(counts, dict)
        for reason, tokens in counts.items():
            yield f"  {tokens:,} {kind}{' to' if kind == 'moved' else ':'} {reason}"


def length_census(stores: Sequence[PackedStore]) -> pd.DataFrame:
    """Pieces and tokens of each domain by length in powers of two, every length between the first and the last.

    Returns:
        store, domain, length_from and length_to (tokens), pieces, tokens; a domain without pieces has no row.
    """
    rows = []
    for store in stores:
        for name in store.domains:
            lengths = store.piece_lengths(name)
            exponents = np.floor(np.log2(lengths)).astype(int)
            for exponent in range(exponents.min(initial=99), exponents.max(initial=0) + 1):
                chosen = lengths[exponents == exponent]
                ends = 2**exponent, 2 ** (exponent + 1) - 1
                rows.append((store.root.name, name, *ends, len(chosen), int(chosen.sum())))
    return pd.DataFrame(rows, columns=["store", "domain", "length_from", "length_to", "pieces", "tokens"])


def _write_census(census: pd.DataFrame, directory: Path, *, named: bool) -> None:
    from ropewalk.figures.figure import write_figure  # late: preparing data draws nothing
    from ropewalk.figures.length_census import length_census_figure

    directory.mkdir(parents=True, exist_ok=True)
    replace_atomically(directory / "length_census.csv", partial(census.to_csv, index=False))
    if named:
        census = census.assign(domain=census["store"] + " " + census["domain"])
    for path in write_figure(length_census_figure(census), directory, ["svg", "png"]):
        print(f"wrote {path}")


def _histogram(store: PackedStore, name: str, info: DomainInfo) -> Iterator[str]:
    """Pieces by length in powers of two; the bar is their share of the domain's tokens."""
    census = length_census([store])
    for row in census[census["domain"] == name].itertuples():
        share = row.tokens / info.tokens
        yield f"  {row.length_from:>9,} to {row.length_to:>9,} {row.pieces:>10,} pieces {share:>7.1%} " + (
            "#" * round(BAR * share)
        )


def _decoded(store: PackedStore, domain: str, index: int) -> Iterator[str]:
    tokenizer = open_tokenizer(store.tokenizer_path)
    if domain not in store.domains:
        raise UserError(f"domain={domain} is not in the store; it has: {', '.join(store.domains)}")
    if not 0 <= index < store.domains[domain].sequences:
        raise UserError(f"sequence={index} is outside 0 .. {store.domains[domain].sequences - 1} of {domain}")
    sequence = store.read(domain, index)
    yield f"sequence {index} of {domain}, {len(sequence.ends)} pieces:"
    for start, end in zip([0, *sequence.ends[:-1].tolist()], sequence.ends.tolist(), strict=True):
        text = tokenizer.decode(sequence.tokens[start:end].tolist())
        yield f"  [{start:>7,}, {end:>7,})  {_shortened(text)!r}"
        for visual in sequence.visuals:
            if start <= visual.start < end:
                content = "pixels" if visual.has_pixels else "embeddings"
                grid, shape = (
                    " x ".join(map(str, s))
                    for s in ((visual.frames, visual.height, visual.width), visual.content.shape)
                )
                yield f"    visual  [{visual.start:>7,}, {visual.end:>7,})  {grid} tokens, {content} {shape}"
        for first, last in _trained(sequence, start, end):
            part = tokenizer.decode(sequence.tokens[first:last].tolist())
            yield f"    trained [{first:>7,}, {last:>7,})  {_shortened(part)!r}"
    padding = store.sequence_length - int(sequence.ends[-1])
    if padding:
        yield f"  {padding:,} tokens of padding"


def _trained(sequence: PackedSequence, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The stretches of a piece that are predicted, where there is a loss mask."""
    if sequence.loss_mask is None:
        return
    mask = sequence.loss_mask[start:end].copy()
    mask[0] = False  # the first token of a piece is never predicted
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)) + start
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _shortened(text: str) -> str:
    return text if len(text) <= 2 * EXCERPT else f"{text[:EXCERPT]} ... {text[-EXCERPT:]}"
