"""The order of the data: a pure function of seed, weights, stores and step."""

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ropewalk.data.order.batches import rank_micro_batches
from ropewalk.data.order.mixture import Mixture, SequenceRef
from ropewalk.runs.record import check_contract

PROLONG = {
    "repositories": 0.30, "books": 0.30, "fineweb_edu": 0.10, "fineweb": 0.10, "stackexchange": 0.04,
    "wikipedia": 0.04, "tulu": 0.03, "arxiv": 0.03, "openwebmath": 0.03, "textbooks": 0.03,
}  # fmt: skip


@dataclass
class Domain:
    sequences: int


@dataclass
class Store:
    """What the order reads of a store."""

    domains: dict[str, Domain]
    sequence_length: int = 64
    fingerprint: str = "f"
    root: str = "store"
    tokenizer_path: Path = Path("store/tokenizer")
    tokenizer: dict[str, str] = field(default_factory=lambda: {"sha256": "t"})
    longest: dict[str, list[int]] = field(default_factory=dict)

    def longest_documents(self, domain: str) -> np.ndarray:
        return np.array(self.longest[domain])

    def trained_tokens(self, domain: str, index: int) -> int:
        return 1000 * len(domain) + index


def store_of(length: int = 64, **sequences: int) -> Store:
    return Store({name: Domain(number) for name, number in sequences.items()}, length)


def order(mixture: Mixture, steps: range) -> list[SequenceRef]:
    return [ref for step in steps for ref in mixture.global_batch(step)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.001, 1.0), min_size=1, max_size=12), st.integers(0, 2**31), st.integers(1, 9),
    st.integers(0, 900),
)  # fmt: skip
def test_a_step_jumped_to_equals_the_step_reached(weights, seed, batch, step):
    names = {f"d{i}": weight for i, weight in enumerate(weights)}
    store = store_of(**{name: 7 + 5 * i for i, name in enumerate(names)})
    whole = Mixture(seed, names, store).global_batch
    walked = [whole(rank)[0] for rank in range(step * batch, (step + 1) * batch)]
    assert Mixture(seed, names, store, batch).global_batch(step) == walked


def test_a_step_does_not_depend_on_what_was_asked_before():
    store, weights = store_of(a=13, b=7), {"a": 0.6, "b": 0.4}
    forward = Mixture(1, weights, store, 4)
    in_order = [forward.global_batch(step) for step in range(600)]
    backward = Mixture(1, dict(reversed(weights.items())), store, 4)
    assert [backward.global_batch(step) for step in reversed(range(600))] == in_order[::-1]


def test_the_seed_changes_the_order_and_nothing_else():
    store, weights = store_of(**dict.fromkeys(PROLONG, 40)), PROLONG
    orders = [order(Mixture(seed, weights, store, 10), range(100)) for seed in (0, 1)]
    assert orders[0] != orders[1]
    domains = [[ref.domain for ref in one] for one in orders]
    assert domains[0] != domains[1]
    assert Counter(domains[0]) == Counter(domains[1])
    assert order(Mixture(0, {n: 100 * w for n, w in weights.items()}, store, 10), range(100)) == orders[0]


@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_ranks_and_sequence_parallel_groups_see_the_same_global_batch(store_64, sequence_parallel):
    mixture = Mixture(0, {}, store_64, 16)
    for step, ranks, micro in itertools.product((0, 5, 1000), (1, 2, 4, 8), (1, 2)):
        groups = max(1, ranks // sequence_parallel)
        dealt = [rank_micro_batches(mixture, step, rank, groups, micro) for rank in range(groups)]
        joined = [ref for rank in dealt for part in rank for ref in part]
        assert Counter(joined) == Counter(mixture.global_batch(step))


def test_shares_are_exact_over_every_period_and_near_between():
    store = store_of(**dict.fromkeys(PROLONG, 10**6))
    domains = [ref.domain for ref in order(Mixture(3, PROLONG, store, 50), range(100))]
    for period in range(5):
        held = Counter(domains[1000 * period : 1000 * (period + 1)])
        assert held == {name: round(1000 * weight) for name, weight in PROLONG.items()}


def test_weights_without_a_short_period_are_exact_in_the_long_run():
    weights = {"a": 0.1234567, "b": 0.7, "rare": 0.00002}
    mixture = Mixture(0, weights, store_of(**dict.fromkeys(weights, 1)), 1024)
    drawn, total = mixture.epochs(10**6), sum(weights.values())
    for name, weight in weights.items():
        assert abs(drawn[name] - 1024e6 * weight / total) < 2.5


def test_far_steps_are_reached_without_history():
    mixture = Mixture(3, {"a": 2, "b": 1}, store_of(a=17, b=5), 6)
    assert mixture.epochs(10**12)["a"] == pytest.approx(6e12 * 2 / 3 / 17, rel=1e-9)
    assert len(mixture.global_batch(10**12)) == 6


def test_every_row_comes_once_before_any_comes_twice():
    mixture = Mixture(5, {"a": 1, "b": 1}, store_of(a=37, b=11), 10)
    rows = [ref.rows[0] for ref in order(mixture, range(80)) if ref.domain == "a"][:370]
    epochs = [tuple(rows[start : start + 37]) for start in range(0, 370, 37)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len(set(epochs)) == 10
    assert mixture.repeated(4) == ("b",)
    assert mixture.repeated(2) == ()


def test_epochs_count_what_was_drawn():
    mixture = Mixture(0, {"a": 1, "b": 1}, store_of(a=4, b=6), 2)
    assert mixture.epochs(0) == {"a": 0.0, "b": 0.0}
    drawn = Counter(ref.domain for ref in order(mixture, range(9)))
    assert mixture.epochs(9) == {"a": drawn["a"] / 4, "b": drawn["b"] / 6}


def test_orders_of_different_domains_epochs_and_seeds_are_unrelated():
    """Where the same row stands in two epochs, two domains or two seeds: rank correlations of independent shuffles."""
    store = store_of(a=2000, b=2000)
    found = []
    for seed in (0, 1):
        mixture = Mixture(seed, {"a": 1, "b": 1}, store, 800)
        refs = order(mixture, range(11))  # 8,800 draws: more than 4,000 of each
        for name in ("a", "b"):
            rows = [ref.rows[0] for ref in refs if ref.domain == name]
            found += [rows[:2000], rows[2000:4000]]
    for one, other in itertools.combinations(found, 2):
        assert sorted(one) == list(range(2000))
        assert abs(stats.spearmanr(np.argsort(one), np.argsort(other)).statistic) * np.sqrt(2000) < 4


class TestShorterSequences:
    """512k training from stores of 512k and of 64k sequences: eight of the latter make one."""

    def mixture(self, batch=4):
        stores = {"": store_of(512, books=6, repositories=5), "short": store_of(64, books=20, web=17)}
        weights = {"books": 0.2, "repositories": 0.1, "short/books": 0.4, "short/web": 0.3}
        return Mixture(2, weights, stores, batch)

    def test_eight_rows_make_one_sequence(self):
        for ref in order(self.mixture(), range(40)):
            assert len(ref.rows) == (8 if ref.domain.startswith("short/") else 1)

    def test_every_row_comes_once_before_any_comes_twice(self):
        """17 rows do not divide by eight: the last of an epoch and the first of the next share a sequence."""
        refs = [ref for ref in order(self.mixture(), range(200)) if ref.domain == "short/web"]
        rows = [row for ref in refs for row in ref.rows]
        for start in range(0, len(rows) - 16, 17):
            assert sorted(rows[start : start + 17]) == list(range(17))

    def test_epochs_count_rows(self):
        drawn = Counter(ref.domain for ref in order(self.mixture(), range(50)))
        epochs = self.mixture().epochs(50)
        assert epochs["short/web"] == drawn["short/web"] * 8 / 17
        assert epochs["books"] == drawn["books"] / 6

    def test_no_weights_means_in_proportion_to_training_sequences(self):
        stores = {"": store_of(512, books=6), "short": store_of(64, web=16)}
        assert Mixture(0, {}, stores).weights == {"books": 0.75, "short/web": 0.25}

    def test_one_store_may_be_shorter_than_the_training_length(self):
        mixture = Mixture(0, {}, store_of(64, a=9), 2, sequence_length=128)
        rows = [row for ref in order(mixture, range(9)) for row in ref.rows]
        assert [Counter(rows[start : start + 9]) for start in (0, 9, 18, 27)] == [Counter(range(9))] * 4

    def test_stores_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match=r"data.sequence_length=100, but store holds sequences of 64 tokens"):
            Mixture(0, {}, store_of(64, a=9), sequence_length=100)
        other = store_of(64, a=3)
        other.tokenizer = {"sha256": "u"}
        with pytest.raises(ValueError, match="tokens of another tokenizer"):
            Mixture(0, {}, {"": store_of(64, a=9), "more": other})
        with pytest.raises(ValueError, match="nothing to draw from"):
            Mixture(0, {}, {})


class TestCurriculum:
    """Weights that change at declared steps."""

    store = store_of(a=11, b=7, c=5)
    first, second, third = {"a": 0.5, "b": 0.5}, {"b": 0.25, "c": 0.75}, {"a": 1.0}

    def test_before_the_change_nothing_differs(self):
        changed = Mixture(1, self.first, self.store, 4, curriculum={100: self.second})
        plain = Mixture(1, self.first, self.store, 4)
        assert order(changed, range(100)) == order(plain, range(100))
        assert changed.unused == ()
        assert plain.unused == ("c",)

    def test_domains_go_on_where_they_were(self):
        mixture = Mixture(1, self.first, self.store, 4, curriculum={300: self.third, 37: self.second})
        refs = order(mixture, range(420))
        for name, size in (("a", 11), ("b", 7), ("c", 5)):
            rows = [ref.rows[0] for ref in refs if ref.domain == name]
            for start in range(0, len(rows) - size + 1, size):
                assert sorted(rows[start : start + size]) == list(range(size))
        shares = [Counter(ref.domain for ref in order(mixture, steps)) for steps in (range(37, 293), range(300, 420))]
        assert shares[0] == {"b": 256, "c": 768}  # one whole period of 1,024
        assert shares[1] == {"a": 480}
        drawn = Counter(ref.domain for ref in refs)
        assert mixture.epochs(420) == {"a": drawn["a"] / 11, "b": drawn["b"] / 7, "c": drawn["c"] / 5}

    def test_a_change_that_says_nothing_is_refused(self):
        with pytest.raises(ValueError, match="curriculum changes weights at step 0; step 0 has the mixture's"):
            Mixture(1, self.first, self.store, 4, curriculum={0: self.second})
        with pytest.raises(ValueError, match="curriculum has no weights at step 3"):
            Mixture(1, self.first, self.store, 4, curriculum={3: {}})
        with pytest.raises(ValueError, match="names the domain 'x'"):
            Mixture(1, self.first, self.store, 4, curriculum={3: {"x": 1}})

    def test_it_is_in_the_contract(self):
        contract = Mixture(1, self.first, self.store, 4, curriculum={100: self.second}).contract()
        assert contract["weights"] == {"a": "1/2", "b": "1/2"}
        assert contract["curriculum"] == {"100": {"b": "1/4", "c": "3/4"}}
        assert json.loads(json.dumps(contract)) == contract


def store_with(**longest: list[int]) -> Store:
    """A store whose sequences' longest documents have these tokens."""
    return Store({name: Domain(len(lengths)) for name, lengths in longest.items()}, longest=longest)


class TestLengthWeights:
    """Sequences drawn by the length of their longest document."""

    # 6 short, 3 middle, 3 long; 4 short, 4 long
    store = store_with(a=[5, 63, 16, 8, 8, 64, 15, 64, 1, 2, 17, 31], b=[3, 64, 3, 64, 3, 64, 3, 64])
    weights, mixture = {0: 1.0, 16: 0.5, 32: 3.0}, {"a": 0.6, "b": 0.4}

    def order(self, **options):
        return Mixture(7, self.mixture, self.store, 10, length_weights=self.weights, **options)

    def test_counts_are_weight_times_sequences_within_each_domains_share(self):
        """Of a: 6 x 1 : 3 x 0.5 : 3 x 3 = 12 : 3 : 18 of 33, times 3/5; of b: 4 x 1 : 4 x 3 = 1 : 3, times 2/5."""
        shares = {"a[0:16]": 12 / 55, "a[16:32]": 3 / 55, "a[32:]": 18 / 55, "b[0:16]": 0.1, "b[32:]": 0.3}
        assert self.order().weights == pytest.approx(shares, rel=1e-15)
        refs = order(self.order(), range(99))  # a period of 990 slots, 9 times the common denominator of 110
        longest = [(ref.domain, self.store.longest[ref.domain][ref.rows[0]]) for ref in refs]
        held = Counter((domain, min(length // 16, 2)) for domain, length in longest)
        assert held == {("a", 0): 216, ("a", 1): 54, ("a", 2): 324, ("b", 0): 99, ("b", 2): 297}

    def test_every_row_of_a_bucket_comes_once_before_any_comes_twice(self):
        refs = order(self.order(), range(99))
        buckets = {("a", False): [0, 3, 4, 6, 8, 9], ("a", True): [1, 5, 7], ("b", True): [1, 3, 5, 7]}
        for (domain, is_long), bucket in buckets.items():
            lengths = self.store.longest[domain]
            rows = [r.rows[0] for r in refs if r.domain == domain and (lengths[r.rows[0]] >= 32) == is_long]
            rows = [row for row in rows if is_long or lengths[row] < 16]
            whole = len(rows) // len(bucket) * len(bucket)
            assert whole > 30
            for start in range(0, whole, len(bucket)):
                assert sorted(rows[start : start + len(bucket)]) == bucket
        assert self.order().repeated(99) == ("a[0:16]", "a[16:32]", "a[32:]", "b[0:16]", "b[32:]")
        assert self.order().epochs(99)["a[32:]"] == 324 / 3

    def test_a_step_jumped_to_equals_the_step_reached(self):
        reached = self.order(curriculum={20: {"b": 1.0}})
        walked = [reached.global_batch(step) for step in range(60)]
        assert (
            Mixture(
                7, self.mixture, self.store, 10, length_weights={32: 3, 0: 1, 16: 0.5}, curriculum={20: {"b": 1.0}}
            ).global_batch(59)
            == walked[59]
        )
        assert walked[:20] == [self.order().global_batch(step) for step in range(20)]

    def test_left_out_buckets_never_come_and_are_reported(self):
        mixture = Mixture(0, {}, self.store, 8, length_weights={0: 0, 32: 1})
        assert mixture.unused == ("a[0:32]", "b[0:32]")
        refs = order(mixture, range(50))
        assert {self.store.longest[ref.domain][ref.rows[0]] for ref in refs} == {63, 64}
        assert mixture.weights == pytest.approx({"a[32:]": 0.6, "b[32:]": 0.4})  # 12 and 8 sequences, as without

    def test_the_first_bucket_must_be_named_and_may_be_empty(self):
        """Where no document is short, each domain keeps its share and nothing is left out."""
        shortest = int(min(map(min, self.store.longest.values())))
        weights = {0: 1, shortest: 2}
        mixture = Mixture(0, {}, self.store, 8, length_weights=weights)
        assert mixture.weights == pytest.approx({f"a[{shortest}:]": 0.6, f"b[{shortest}:]": 0.4})
        assert mixture.unused == ()

    def test_a_resume_under_other_length_weights_is_refused(self):
        saved = self.order().contract()
        assert json.loads(json.dumps(saved)) == saved
        assert saved["weights"] == {
            "a[0:16]": "12/55", "a[16:32]": "3/55", "a[32:]": "18/55", "b[0:16]": "1/10", "b[32:]": "3/10"
        }  # fmt: skip
        assert check_contract(saved, self.order().contract(), []) == {}
        for others in ({}, {0: 1, 16: 0.5, 33: 3}, {0: 1, 16: 0.5, 32: 2}):
            present = Mixture(7, self.mixture, self.store, 10, length_weights=others).contract()
            with pytest.raises(
                ValueError, match=r"this run is not the one that was saved: .*weights\.a\[32:\] was '18/55'"
            ):
                check_contract(saved, present, [])

    def test_a_real_stores_sequences_are_told_apart_by_their_longest_document(self, store_256):
        mixture = Mixture(0, {}, {"": store_256, "x": store_256}, 16, length_weights={0: 0, 100: 1, 256: 2})
        whole = sum(info.sequences for info in store_256.domains.values())
        for name in store_256.domains:
            rows = range(store_256.domains[name].sequences)
            longest = [max(np.diff(store_256.read(name, row).ends, prepend=0)) for row in rows]
            assert store_256.longest_documents(name).tolist() == longest
            middle, long = sum(100 <= n < 256 for n in longest), sum(n == 256 for n in longest)
            shares = {part: share for part, share in mixture.weights.items() if part.startswith(f"{name}[")}
            parts = (shares.get(f"{name}[100:256]", 0), shares.get(f"{name}[256:]", 0))
            assert parts[0] * 2 * long == pytest.approx(parts[1] * middle)
            assert sum(parts) == pytest.approx(store_256.domains[name].sequences / 2 / whole)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ({0: 1, 16: -1}, "has the weight -1 from 16 tokens on; weights are finite and at least 0"),
            ({0: 1, 16: float("nan")}, "has the weight nan from 16 tokens on"),
            ({0: float("inf")}, "has the weight inf"),
            ({0: 0.0, 16: 0.0}, "has no positive weight; give one"),
            ({16: 1.0}, "begins at 16 tokens; the first bucket begins at 0, so add"),
            ({-1: 1.0, 0: 1.0}, "begins at -1 tokens; the first bucket begins at 0"),
            (
                {0: 1, 65: 2},
                "names a bucket from 65 tokens on that no sequence is in .* of up to 64 tokens.; leave 65 out",
            ),
            ({0: 0, 4: 0, 32: 0, 64: 0, 40: 1}, "leaves no sequence of b, whose documents have up to 64 tokens"),
        ],
    )
    def test_bad_weights_are_refused(self, weights, message):
        with pytest.raises(ValueError, match=rf"data\.length_weights=\{{.*\}} {message}"):
            Mixture(0, {"b": 1.0}, self.store, length_weights=weights)


def test_trained_tokens_sum_over_the_batch():
    mixture = Mixture(0, {"a": 1, "bb": 1}, store_of(a=4, bb=6), 5)
    assert mixture.trained_tokens(3) == sum(1000 * len(r.domain) + r.rows[0] for r in mixture.global_batch(3))


def test_trained_tokens_of_a_real_store_are_its_labels(store_64):
    mixture = Mixture(0, {}, store_64, 8)
    for step in range(5):
        pieces = [np.diff(store_64.read(r.domain, *r.rows).ends, prepend=0) for r in mixture.global_batch(step)]
        assert mixture.trained_tokens(step) == sum(int((piece - 1).sum()) for piece in pieces)


def test_no_weights_means_in_proportion_to_sequences():
    mixture = Mixture(0, {}, store_of(a=30, b=10, none=0))
    assert mixture.weights == {"a": 0.75, "b": 0.25}
    assert mixture.unused == ("none",)


def test_unnamed_domains_are_reported():
    mixture = Mixture(0, {"b": 2, "c": 0}, store_of(a=3, b=3, c=3))
    assert mixture.unused == ("a", "c")
    assert {ref.domain for ref in order(mixture, range(10))} == {"b"}


def test_contract_names_all_that_the_order_depends_on():
    assert Mixture(9, {"a": 3, "b": 1}, store_of(a=3, b=3), 4).contract() == {
        "order": 2,
        "weights": {"a": "3/4", "b": "1/4"},
        "curriculum": {},
        "seed": 9,
        "store": "f",
        "global_batch_size": 4,
        "sequence_length": 64,
    }


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"x": 1.0}, "names the domain 'x', which the store does not have; use some of: a, b, empty"),
        ({"a": -0.5}, "gives a the weight -0.5; weights are finite and at least 0"),
        ({"a": float("nan")}, "gives a the weight nan"),
        ({"a": 0.0}, "has no positive weight; give one to at least one of: a, b, empty"),
        ({"a": 1.0, "empty": 0.1}, "gives empty the weight 0.1, but it has no sequences; set it to 0"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(0, weights, store_of(a=3, b=3, empty=0))


def test_bad_steps_and_batches_are_refused():
    with pytest.raises(ValueError, match="global_batch_size=0 must be positive"):
        Mixture(0, {}, store_of(a=3), 0)
    with pytest.raises(ValueError, match="step=-1 must not be negative"):
        Mixture(0, {}, store_of(a=3)).global_batch(-1)


@pytest.mark.parametrize("bounds", [[], [0, 16]])
def test_golden_order(bounds):
    """Every run that resumes relies on this order: computed here from SHA-256, splitmix64 and the rules alone."""
    mask, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def key(*parts):
        return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    def row(part, draw, seed):
        epoch, x = divmod(draw, len(rows[part]))
        state = key("order", seed, part, epoch)
        for _ in range(64):  # swap-or-not
            state = (state + gamma) & mask
            partner = (mix(state) - x) % len(rows[part])
            if mix((mix(state ^ gamma) + max(x, partner)) & mask) >> 63:
                x = partner
        return rows[part][x]

    seed, longest = 11, {"long": [64, 9, 64, 64, 16], "short": [3, 15, 2]}
    if bounds:  # with weights 1 and 2: 1 : 8 of long's share of 3/4, that is 1/12 and 8/12
        rows, slots = {"long[0:16]": [1], "long[16:]": [0, 2, 3, 4], "short[0:16]": [0, 1, 2]}, (85, 680, 255)
    else:
        rows, slots = {"long": [0, 1, 2, 3, 4], "short": [0, 1, 2]}, (768, 256)
    ordered = [part for part, count in zip(rows, slots, strict=True) for _ in range(count)]
    owners = []
    for period in range(2):
        start = key("slots", seed, 0, period)
        values = [mix((start + i * gamma) & mask) for i in range(1, len(ordered) + 1)]
        owners += [ordered[i] for i in sorted(range(len(ordered)), key=values.__getitem__)]
    drawn, expected = Counter(), []
    for owner in owners:
        expected.append(SequenceRef(owner.partition("[")[0], (row(owner, drawn[owner], seed),)))
        drawn[owner] += 1
    weights = {"long": 0.75, "short": 0.25}
    mixture = Mixture(seed, weights, store_with(**longest), 4, length_weights=dict(zip(bounds, (1, 2), strict=False)))
    assert order(mixture, range(sum(slots) // 2)) == expected
    assert Fraction(sum(drawn[part] for part in rows if part.startswith("long")), 2 * sum(slots)) == Fraction(3, 4)
