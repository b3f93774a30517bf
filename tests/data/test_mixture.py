from collections import Counter
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.data.mixture import Mixture, SequenceRef


@dataclass
class Domain:
    sequences: int


@dataclass
class Store:
    """What the order reads of a store."""

    domains: dict[str, Domain]
    sequence_length: int = 64
    fingerprint: str = "f"
    lengths: dict[str, int] = field(default_factory=dict)

    def trained_tokens(self, domain: str, index: int) -> int:
        return 1000 * len(domain) + index


def store_of(**sequences: int) -> Store:
    return Store({name: Domain(number) for name, number in sequences.items()})


def draws_from_scratch(mixture: Mixture, number: int) -> list[tuple[str, int]]:
    """The first draws (domain, k): all candidate times, sorted."""
    times = []
    for d, name in enumerate(sorted(mixture.weights)):
        weight, offset = mixture.weights[name], mixture._offsets[d]
        times += [((k + offset) / weight, d, name, k) for k in range(number)]
    return [(name, k) for _, _, name, k in sorted(times)[:number]]


cases = st.tuples(
    st.lists(st.floats(0.001, 1.0), min_size=1, max_size=12),
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(0, 60),
)


@settings(max_examples=100, deadline=None)
@given(cases)
def test_any_step_equals_the_merge_from_scratch(case):
    weights, seed, batch, step = case
    names = {f"d{i}": weight for i, weight in enumerate(weights)}
    mixture = Mixture(store_of(**{name: 10**6 for name in names}), names, seed, batch)
    expected = draws_from_scratch(mixture, (step + 1) * batch)[step * batch :]
    counts, heap = mixture._draws_before(step)
    assert [mixture._draw(counts, heap) for _ in range(batch)] == expected


def test_shares_hold_at_every_prefix():
    weights = {"a": 0.3, "b": 0.3, "c": 0.1, "d": 0.1, "e": 0.1, "f": 0.07, "g": 0.03}
    mixture = Mixture(store_of(**dict.fromkeys(weights, 50)), weights, 7, 1)
    seen: Counter[str] = Counter()
    for step in range(1500):
        seen[mixture.batch(step)[0].domain] += 1
        for name, weight in weights.items():
            assert abs(seen[name] - (step + 1) * weight) < 1 + len(weights) * weight


def test_far_steps_are_reached_without_history():
    mixture = Mixture(store_of(a=17, b=5), {"a": 2, "b": 1}, 3, 6)
    far = mixture.epochs(10**9)
    assert far["a"] == pytest.approx(6e9 * 2 / 3 / 17, abs=1 / 17)
    assert len(mixture.batch(10**9)) == 6


def test_a_step_does_not_depend_on_what_was_asked_before():
    store, weights = store_of(a=13, b=7), {"a": 0.6, "b": 0.4}
    forward = Mixture(store, weights, 1, 4)
    in_order = [forward.batch(step) for step in range(30)]
    backward = Mixture(store, {"b": 0.4, "a": 0.6}, 1, 4)
    assert [backward.batch(step) for step in reversed(range(30))] == in_order[::-1]
    assert (
        Mixture(store, weights, 2, 4).batch(0) != in_order[0] or Mixture(store, weights, 2, 4).batch(1) != in_order[1]
    )


def test_global_batch_size_only_groups_the_order():
    store, weights = store_of(a=13, b=7), {"a": 0.6, "b": 0.4}
    single = Mixture(store, weights, 1, 1)
    flat = [single.batch(step)[0] for step in range(60)]
    six = Mixture(store, weights, 1, 6)
    assert [ref for step in range(10) for ref in six.batch(step)] == flat


def test_each_epoch_is_a_permutation_of_its_own():
    mixture = Mixture(store_of(a=37), {"a": 1}, 5, 10)
    order = [ref.index for step in range(37) for ref in mixture.batch(step)]
    epochs = [tuple(order[start : start + 37]) for start in range(0, 370, 37)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len(set(epochs)) == 10


def test_epochs_count_what_was_drawn():
    mixture = Mixture(store_of(a=4, b=6), {"a": 1, "b": 1}, 0, 2)
    assert mixture.epochs(0) == {"a": 0.0, "b": 0.0}
    drawn = Counter(ref.domain for step in range(9) for ref in mixture.batch(step))
    assert mixture.epochs(9) == {"a": drawn["a"] / 4, "b": drawn["b"] / 6}


def test_trained_tokens_sum_over_the_batch():
    mixture = Mixture(store_of(a=4, bb=6), {"a": 1, "bb": 1}, 0, 5)
    assert mixture.trained_tokens(3) == sum(1000 * len(ref.domain) + ref.index for ref in mixture.batch(3))


def test_trained_tokens_of_a_real_store_are_its_labels(store_64):
    mixture = Mixture(store_64, {}, 0, 8)
    for step in range(5):
        pieces = [np.diff(store_64.read(ref.domain, ref.index).ends, prepend=0) for ref in mixture.batch(step)]
        assert mixture.trained_tokens(step) == sum(int((piece - 1).sum()) for piece in pieces)


def test_no_weights_means_in_proportion_to_sequences():
    mixture = Mixture(store_of(a=30, b=10, none=0), {}, 0, 1)
    assert mixture.weights == {"a": 0.75, "b": 0.25}
    assert mixture.unused == ("none",)


def test_unnamed_domains_are_reported():
    mixture = Mixture(store_of(a=3, b=3, c=3), {"b": 2, "c": 0}, 0, 1)
    assert mixture.unused == ("a", "c")
    assert {mixture.batch(step)[0].domain for step in range(10)} == {"b"}


def test_contract_names_all_that_the_order_depends_on():
    contract = Mixture(store_of(a=3, b=3), {"a": 3, "b": 1}, 9, 4).contract()
    assert contract == {
        "weights": {"a": 0.75, "b": 0.25},
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
        Mixture(store_of(a=3, b=3, empty=0), weights, 0, 1)


def test_bad_steps_and_batches_are_refused():
    with pytest.raises(ValueError, match="global_batch_size=0 must be positive"):
        Mixture(store_of(a=3), {}, 0, 0)
    with pytest.raises(ValueError, match="step=-1 must not be negative"):
        Mixture(store_of(a=3), {}, 0, 1).batch(-1)


def test_golden_order():
    """Every run that resumes relies on this order: computed here from SHA-256 and integer splitmix64."""
    import hashlib
    import json

    mask = (1 << 64) - 1

    def key(*parts):
        return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    def shuffled(n, *parts):
        values = [mix((key(*parts) + i * 0x9E3779B97F4A7C15) & mask) for i in range(1, n + 1)]
        return sorted(range(n), key=lambda i: values[i])

    sizes, weights, seed = {"long": 5, "short": 3}, {"long": 0.75, "short": 0.25}, 11

    def stream(name):
        for k in count():
            epoch, position = divmod(k, sizes[name])
            index = shuffled(sizes[name], "order", seed, name, epoch)[position]
            offset = ((key("offset", seed, name) >> 12) + 0.5) / 2**52
            yield (k + offset) / weights[name], name, index

    merged = sorted([*islice(stream("long"), 60), *islice(stream("short"), 60)])[:40]
    mixture = Mixture(store_of(**sizes), weights, seed, 8)
    assert [ref for step in range(5) for ref in mixture.batch(step)] == [SequenceRef(n, i) for _, n, i in merged]
