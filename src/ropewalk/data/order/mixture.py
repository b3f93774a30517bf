"""The data order: which sequences step k sees, as a pure function of seed, weights, stores and k."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ropewalk.data.store.hashing import GAMMA, mixed, permutation, stable_key
from ropewalk.data.store.reader import JoinedStore, PackedStore
from ropewalk.errors import UserError

PERIOD = 1024  # slots of a period, at most
ORDER = 2  # version of the function below; a checkpoint of another one sees other data from here on


@dataclass(frozen=True, slots=True)
class SequenceRef:
    """One training sequence: rows of a packed store, one unless the store's sequences are shorter.

    Attributes:
        domain: of the rows.
        rows: their numbers in the domain.
        epochs: of their part of the domain (see Mixture), from 0, for each of them.
    """

    domain: str
    rows: tuple[int, ...]
    epochs: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows that are shuffled as one: all of a domain, or those in one of its length buckets.

    Attributes:
        name: the domain's, with its bucket: ``books``, ``books[0:4096]``, ``books[4096:]``.
        domain: of the rows.
        size: how many rows.
        rows: their numbers in the domain, int64 (size,); None: all of them.
        share: of the domain's sequences.
    """

    name: str
    domain: str
    size: int
    rows: NDArray[np.int64] | None = None
    share: Fraction = Fraction(1)


@dataclass(frozen=True)
class _Segment:
    """Steps with the same weights: the slots, and the draws that each of its parts had had before."""

    first_step: int
    parts: tuple[_Part, ...]
    shares: tuple[Fraction, ...]
    slots: Slots
    drawn: Mapping[str, int]


class Mixture:
    """Interleaves domains in fixed proportions. It holds no state but a cache: any step costs the same.

    Every slot of the endless row of training sequences belongs to a part (see Slots): a domain, or under
    ``length_weights`` a domain's rows in one length bucket. A part of n rows fills its slots from epochs, each a keyed
    permutation of all n rows, so every row comes once before any comes twice. Weights that change at declared steps
    begin a new row of slots; the parts go on where they were.

    The bucket of a row is that of the longest document in it, as long as it lies there: a document that preparation cut
    counts by each piece, since attention sees no more, so no row is longer than its store's sequences. A bucket's
    weight multiplies how often its rows come beside those of the domain's other buckets; the domain keeps its share.
    That is per-source upsampling of long documents (Fu et al., "Data Engineering for Scaling Language Models to 128K
    Context", arXiv 2402.10171).
    """

    def __init__(
        self,
        seed: int,
        weights: Mapping[str, float],
        stores: PackedStore | Mapping[str, PackedStore] | JoinedStore,
        global_batch_size: int = 1,
        *,
        sequence_length: int | None = None,
        curriculum: Mapping[int, Mapping[str, float]] | None = None,
        length_weights: Mapping[int, float] | None = None,
    ) -> None:
        """Check and normalise the weights.

        Args:
            seed: of the order.
            weights: domain -> share of sequences, in any unit; empty: in proportion to what each has.
            stores: a store, or several by name, whose domains are then ``NAME/DOMAIN`` (NAME "": ``DOMAIN``).
            global_batch_size: sequences a step, over all ranks.
            sequence_length: tokens of a training sequence; None: the longest of the stores'.
            curriculum: step (from 1) -> the weights from that step on, counting steps from 0.
            length_weights: first length of a bucket (tokens; it ends before the next one's) -> how often its rows come
                beside the domain's others, in any unit; None or empty: every row as often as any other.

        Raises:
            UserError: for an unknown or empty domain or bucket, a weight that is negative or not finite, weights that
                are all zero, a global batch of no sequences, a change of weights before step 1, or stores that do not
                fit.
        """
        if global_batch_size < 1:
            raise UserError(f"global_batch_size={global_batch_size} must be positive; set it to 1 or more")
        self.store = stores if isinstance(stores, JoinedStore) else JoinedStore(stores, sequence_length)
        self.seed = seed
        self.global_batch_size = global_batch_size
        changes = {0: weights, **_changes(curriculum or {})}
        shares = {step: _normalised(self.store, given) for step, given in sorted(changes.items())}
        domains = sorted({domain for given in shares.values() for domain in given})
        parts = _parts_of(self.store, domains, length_weights or {})
        self._segments = self._divided(shares, [part for part in parts if part.share])
        used = {part.name for segment in self._segments for part in segment.parts}
        left_out = {domain for domain in self.store.domains if domain not in domains}
        self.unused = tuple(sorted({part.name for part in parts} - used | left_out))

    @property
    def weights(self) -> dict[str, float]:
        """Share of each part in the first step; they sum to 1."""
        first = self._segments[0]
        return {part.name: float(share) for part, share in zip(first.parts, first.shares, strict=True)}

    def global_batch(self, step: int) -> list[SequenceRef]:
        """The sequences of ``step`` (from 0), in order: ``global_batch_size`` of them, whoever trains on them."""
        segment, slot = self._find(step)
        owners = segment.slots.between(slot, slot + self.global_batch_size)
        draws = np.empty(self.global_batch_size, np.int64)
        drawn = self._drawn(segment, slot)
        for p, part in enumerate(segment.parts):
            draws[owners == p] = drawn[part.name] + np.arange(np.count_nonzero(owners == p))
        rows = np.array([self.store.rows(part.domain) for part in segment.parts])[owners]
        flat = _rows(self.seed, segment.parts, np.repeat(owners, rows), np.repeat(draws * rows, rows) + _counted(rows))
        numbers, epochs = (np.split(each, np.cumsum(rows)[:-1]) for each in flat)
        return [
            SequenceRef(segment.parts[p].domain, tuple(number.tolist()), tuple(epoch.tolist()))
            for p, number, epoch in zip(owners, numbers, epochs, strict=True)
        ]

    def trained_tokens(self, step: int) -> int:
        """Tokens that ``step`` predicts, over the whole global batch; read from the store's index alone."""
        return sum(self.store.trained_tokens(ref.domain, row) for ref in self.global_batch(step) for row in ref.rows)

    def epochs(self, step: int) -> dict[str, float]:
        """How often each part has been gone through before ``step``."""
        segment, slot = self._find(step)
        drawn = self._drawn(segment, slot)
        parts = {part.name: part for other in self._segments for part in other.parts}
        return {name: drawn[name] * self.store.rows(parts[name].domain) / parts[name].size for name in sorted(drawn)}

    def repeated(self, step: int) -> tuple[str, ...]:
        """Parts that have run out, and so begun to repeat, before ``step``."""
        return tuple(name for name, epochs in self.epochs(step).items() if epochs > 1)

    def contract(self) -> dict[str, object]:
        """Everything that the order depends on, for a checkpoint to compare on resume.

        Shares are exact fractions. Those of length buckets have the buckets' bounds in their names.
        """
        shares = {
            str(segment.first_step): {
                part.name: str(share) for part, share in zip(segment.parts, segment.shares, strict=True)
            }
            for segment in self._segments
        }
        return {
            "order": ORDER,
            "weights": shares.pop("0"),
            "curriculum": shares,
            "seed": self.seed,
            "store": self.store.fingerprint,
            "global_batch_size": self.global_batch_size,
            "sequence_length": self.store.sequence_length,
        }

    def _divided(self, changes: Mapping[int, Mapping[str, Fraction]], parts: Sequence[_Part]) -> list[_Segment]:
        segments: list[_Segment] = []
        for number, (step, shares) in enumerate(changes.items()):
            drawn = {}
            if segments:
                last = segments[-1]
                drawn = self._drawn(last, (step - last.first_step) * self.global_batch_size)
            chosen = tuple(part for part in parts if part.domain in shares)
            of_all = tuple(shares[part.domain] * part.share for part in chosen)
            segments.append(_Segment(step, chosen, of_all, Slots(of_all, "slots", self.seed, number), drawn))
        return segments

    def _find(self, step: int) -> tuple[_Segment, int]:
        """The segment that ``step`` lies in, and the slot that it begins with there."""
        if step < 0:
            raise UserError(f"step={step} must not be negative; steps count from 0")
        number = bisect_right(self._segments, step, key=lambda segment: segment.first_step) - 1
        segment = self._segments[number]
        return segment, (step - segment.first_step) * self.global_batch_size

    def _drawn(self, segment: _Segment, slot: int) -> dict[str, int]:
        """Sequences drawn from each part before ``slot`` of a segment, those of earlier segments included."""
        counts = dict(zip((part.name for part in segment.parts), segment.slots.before(slot).tolist(), strict=True))
        return {name: segment.drawn.get(name, 0) + counts.get(name, 0) for name in {**segment.drawn, **counts}}


def _rows(
    seed: int, parts: Sequence[_Part], owners: NDArray[np.int64], draws: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The row of its domain that each draw of a part is, rows being drawn one by one, and the epoch that it is of."""
    sizes = np.array([part.size for part in parts])[owners]
    epochs, positions = np.divmod(draws, sizes)
    shuffles, shuffle_of_draw = np.unique(np.stack([owners, epochs]), axis=1, return_inverse=True)
    keys = [stable_key("order", seed, parts[p].name, epoch) for p, epoch in shuffles.T.tolist()]
    numbers = permuted(positions, sizes, np.array(keys, np.uint64)[shuffle_of_draw])
    for p, part in enumerate(parts):
        if part.rows is not None:
            numbers[owners == p] = part.rows[numbers[owners == p]]
    return numbers, epochs


def _counted(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... length - 1 for each length, one after the other."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)


def _changes(curriculum: Mapping[int, Mapping[str, float]]) -> dict[int, Mapping[str, float]]:
    for step, weights in curriculum.items():
        if step < 1:
            raise UserError(f"curriculum changes weights at step {step}; step 0 has the mixture's, so name 1 or later")
        if not weights:
            raise UserError(f"curriculum has no weights at step {step}; name the domain shares from there on")
    return dict(curriculum)


def _normalised(store: JoinedStore, weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Positive shares that sum to 1, exactly as the weights' decimals say, in the order of the domains' names."""
    domains = store.domains
    known = ", ".join(sorted(domains))
    for name, weight in weights.items():
        if name not in domains:
            raise UserError(f"mixture names the domain {name!r}, which the store does not have; use some of: {known}")
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"mixture gives {name} the weight {weight}; weights are finite and at least 0 (0: unused)")
        if weight > 0 and domains[name].sequences == 0:
            raise UserError(f"mixture gives {name} the weight {weight}, but it has no sequences; set it to 0")
    given = {name: Fraction(repr(float(weight))) for name, weight in weights.items()}
    if not given:
        given = {name: Fraction(info.sequences, store.rows(name)) for name, info in domains.items()}
    total = sum(given.values())
    if total <= 0:
        raise UserError(f"mixture {dict(weights)} has no positive weight; give one to at least one of: {known}")
    return {name: given[name] / total for name in sorted(given) if given[name] > 0}


def _parts_of(store: JoinedStore, domains: Sequence[str], length_weights: Mapping[int, float]) -> list[_Part]:
    """The parts of each domain, those without a share included, in the order of domains and lengths."""
    if not length_weights:
        return [_Part(domain, domain, store.domains[domain].sequences) for domain in domains]
    given = f"data.length_weights={dict(length_weights)}"
    _check_length_weights(length_weights, given)
    starts = sorted(length_weights)
    weights = [Fraction(repr(float(length_weights[start]))) for start in starts]
    parts: list[_Part] = []
    held: set[int] = set()
    most = 0
    for domain in domains:
        lengths = store.longest_documents(domain)
        most = max(most, int(lengths.max()))
        buckets = np.searchsorted(starts, lengths, side="right") - 1
        rows = [np.flatnonzero(buckets == bucket) for bucket in range(len(starts))]
        total = sum(weight * len(numbers) for weight, numbers in zip(weights, rows, strict=True))
        if not total:
            raise UserError(
                f"{given} leaves no sequence of {domain}, whose documents have up to {lengths.max()} tokens; give "
                "these lengths a weight above 0, or the domain none in data.mixture"
            )
        for start, end, weight, numbers in zip(starts, [*starts[1:], ""], weights, rows, strict=True):
            if len(numbers):
                held.add(start)
                share = weight * len(numbers) / total
                parts.append(_Part(f"{domain}[{start}:{end}]", domain, len(numbers), numbers, share))
    for start in starts[1:]:  # the first must be named, so it may be empty
        if length_weights[start] > 0 and start not in held:
            raise UserError(
                f"{given} names a bucket from {start} tokens on that no sequence is in (documents lie in sequences by "
                f"pieces, here of up to {most} tokens); leave {start} out"
            )
    return parts


def _check_length_weights(length_weights: Mapping[int, float], given: str) -> None:
    for start, weight in length_weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise UserError(
                f"{given} has the weight {weight} from {start} tokens on; weights are finite and at least 0 (0: never)"
            )
    if (first := min(length_weights)) != 0:
        raise UserError(
            f"{given} begins at {first} tokens; the first bucket begins at 0, so add 0: 1.0 (shorter documents as "
            "often as there are) or 0: 0.0 (never)"
        )
    if not any(length_weights.values()):
        raise UserError(f"{given} has no positive weight; give one to at least one bucket")


class Slots:
    """Slots in fixed shares.

    A period holds an integer number of slots for each domain, shuffled by a key of its own. Where the shares have a
    common denominator of at most 1,024, a period is a multiple of it and every period holds the same numbers; else
    the numbers differ by one or so from period to period, such that the periods so far are always as near to the
    shares as whole slots allow (the Webster apportionment).
    """

    def __init__(self, shares: Sequence[Fraction], *key: str | int) -> None:
        """Fix the shares.

        Args:
            shares: positive, of each domain, in any unit.
            key: what shuffles; a period's number is added to it.
        """
        scale = math.lcm(*(share.denominator for share in shares))
        whole = [int(share * scale) for share in shares]
        self._shares = tuple(number // math.gcd(*whole) for number in whole)
        total = sum(self._shares)
        self.period = PERIOD - PERIOD % total if total <= PERIOD else PERIOD
        self._key = key
        self._shuffled: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def before(self, slot: int) -> NDArray[np.int64]:
        """Slots that each domain has among slots 0 .. slot - 1, int64 (domains,): full periods and a prefix."""
        number, offset = divmod(slot, self.period)
        counts = np.array(apportioned(self._shares, number * self.period), dtype=np.int64)
        if offset:
            counts += np.bincount(self._period(number)[:offset], minlength=len(counts))
        return counts

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """The domain of each of the slots start .. stop - 1, int64 (stop - start,)."""
        first, last = start // self.period, (stop - 1) // self.period
        slots = np.concatenate([self._period(number) for number in range(first, last + 1)])
        return slots[start - first * self.period : stop - first * self.period]

    def _period(self, number: int) -> NDArray[np.int64]:
        cached = self._shuffled
        if cached[0] == number:
            return cached[1]
        begin, end = (np.array(apportioned(self._shares, n * self.period)) for n in (number, number + 1))
        ordered = np.repeat(np.arange(len(self._shares)), end - begin)
        slots = ordered[permutation(self.period, *self._key, number)]
        self._shuffled = number, slots
        return slots


def apportioned(shares: Sequence[int], slots: int) -> list[int]:
    """The first ``slots`` slots divided by Webster's method (Sainte-Lague): slot k of a share s is due at (2k + 1) / s.

    Work grows with the number of shares, not with ``slots``; no count falls as ``slots`` grows, none is further than
    (1 + shares * its part of the whole) / 2 from exact, and all are exact at multiples of the sum of the shares.

    Args:
        shares: positive integers.
        slots: to divide, 0 or more.
    """
    total = sum(shares)
    # Rounded at a moment that lies before slot ``slots`` is due, so that these counts never exceed the true ones.
    reached = max(0, slots - len(shares))
    counts = [(2 * share * reached + total) // (2 * total) for share in shares] if reached else [0] * len(shares)
    due = [(Fraction(2 * count + 1, share), d) for d, (count, share) in enumerate(zip(counts, shares, strict=True))]
    heapq.heapify(due)
    for _ in range(slots - sum(counts)):
        d = due[0][1]
        counts[d] += 1
        heapq.heapreplace(due, (Fraction(2 * counts[d] + 1, shares[d]), d))
    return counts


ROUNDS = 64


def permuted(positions: ArrayLike, counts: ArrayLike, keys: ArrayLike) -> NDArray[np.int64]:
    """The image of each position under the permutation of ``range(count)`` that its key picks.

    The swap-or-not shuffle of Hoang, Morris and Rogaway ("An enciphering scheme based on a card shuffle", CRYPTO 2012,
    figure 1): in each round a position x has the partner K - x mod count, and a hash of the larger of the two says
    whether they swap. It needs no power of two, so no cycle walking, and stays a good shuffle for a handful of items.
    The round function is splitmix64's, not a cipher: the order must look random, not keep a secret.

    Args:
        positions: int (n,), each in ``range(count)``.
        counts: int (n,) or one, items that are permuted, at least 1 and below 2**63.
        keys: uint64 (n,) or one.

    Returns:
        int64 (n,).
    """
    x = np.asarray(positions, dtype=np.uint64)
    count = np.asarray(counts, dtype=np.uint64)
    state = np.atleast_1d(np.asarray(keys, dtype=np.uint64))
    for _ in range(ROUNDS):
        state = state + GAMMA
        partner = mixed(state) % count + count - x
        partner = np.where(partner >= count, partner - count, partner)
        swaps = mixed(mixed(state ^ GAMMA) + np.maximum(x, partner)) >> np.uint64(63) == 1
        x = np.where(swaps, partner, x)
    return x.astype(np.int64)
