"""Every token that comes into a domain is packed, moved or dropped, whatever the rules."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.config.data import DomainConfig
from ropewalk.data.prepare.packing import DomainDocuments, chunk, pack_domains
from ropewalk.data.prepare.token_files import FlatDocuments

LENGTHS = st.lists(st.integers(1, 70), max_size=15)
RULES = {
    "books": st.sampled_from([DomainConfig("long", "pool"), DomainConfig("long", "web"), DomainConfig("long")]),
    "code": st.sampled_from([DomainConfig("long", "pool"), DomainConfig("long", "drop")]),
    "pool": st.just(DomainConfig("short")),
    "web": st.just(DomainConfig("short")),
    "plain": st.just(DomainConfig("concat")),
    "chat": st.sampled_from([DomainConfig("short"), DomainConfig("concat")]),
}


def documents(lengths, first):
    """Documents whose tokens are different numbers, even ones masked out."""
    starts = first + np.cumsum([0, *lengths])
    arrays = [np.arange(a, a + n, dtype=np.uint32) for a, n in zip(starts, lengths, strict=False)]
    masks = FlatDocuments.of([array % 2 == 1 for array in arrays])
    return arrays, DomainDocuments(FlatDocuments.of(arrays), masks)


@settings(max_examples=100, deadline=None)
@given(st.fixed_dictionaries(RULES), st.fixed_dictionaries(dict.fromkeys(RULES, LENGTHS)), st.integers(2, 24))
def test_every_token_is_accounted_for(rules, lengths, length):
    arrays, found = {}, {}
    for place, name in enumerate(rules):
        arrays[name], found[name] = documents(lengths[name], 10_000 * place)
        if name != "chat":
            found[name] = DomainDocuments(found[name].documents)
    packed = pack_domains(rules, found, length, 0)
    everything = sorted(np.concatenate([np.zeros(0), *(a for of in arrays.values() for a in of)]).tolist())
    seen, dropped = [], 0
    for name, domain in packed.items():
        account, tokens = domain.accounting, 0
        for sequence in domain.sequences:
            kept = sequence.tokens[: sequence.ends[-1]]
            tokens += len(kept)
            seen += kept.tolist()
            assert len(sequence.tokens) == length
            assert (sequence.loss_mask is not None) == (name == "chat")
            if name == "chat":
                assert sequence.loss_mask[: len(kept)].tolist() == (kept % 2 == 1).tolist()
                assert not sequence.loss_mask[len(kept) :].any()
        moved, lost = sum(account.moved.values()), sum(account.dropped.values())
        own = sum(lengths[name])
        came = sum(p.accounting.moved.get(name, 0) for p in packed.values())
        assert account.tokens_in == own + came == tokens + moved + lost
        dropped += lost
        if rules[name] == DomainConfig("long", "drop"):
            cut_off = sum(n % length for n in lengths[name] if n >= length)
            short = sum(n for n in lengths[name] if n < length)
            assert account.dropped == {
                k: v for k, v in (("remainder", cut_off), ("shorter than a sequence", short)) if v
            }
    assert len(seen) + dropped == len(everything)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(everything)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 20))
def test_chunk_cuts_the_concatenation(lengths, length):
    """Against the plain way: number every token, and look where sequences and documents begin."""
    pieces, bins = chunk(np.array(lengths, dtype=np.int64), length)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.concatenate([np.zeros(0, int), *(np.arange(n) for n in lengths)])
    total = len(owner)
    begins = [i for i in range(total) if i % length == 0 or place[i] == 0]
    assert pieces.document.tolist() == [owner[i] for i in begins]
    assert pieces.start.tolist() == [place[i] for i in begins]
    assert pieces.length.tolist() == np.diff([*begins, total]).tolist() if begins else not len(pieces.length)
    assert np.diff(bins.offsets).tolist() == [sum(i // length == b for i in begins) for b in range(-(-total // length))]


def test_by_hand():
    """Sequences of 4: books of 9 and 3 tokens give two sequences; 1 and 3 go to the pool beside its own 2 and 5."""
    rules = {"books": DomainConfig("long", "pool"), "pool": DomainConfig()}
    (_, books), (_, pool) = documents([9, 3], 0), documents([2, 5], 100)
    found = {"books": DomainDocuments(books.documents), "pool": DomainDocuments(pool.documents)}
    packed = pack_domains(rules, found, 4, 0)
    assert [s.tokens.tolist() for s in packed["books"].sequences] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert packed["books"].accounting.moved == {"pool": 4}
    rows = sorted(s.tokens[: s.ends[-1]].tolist() for s in packed["pool"].sequences)
    # Longest first, each to the fullest bin that takes it: 106 fills up the piece of 3, and 8 goes beside the one of 2.
    assert rows == [[9, 10, 11, 106], [100, 101, 8], [102, 103, 104, 105]]
    assert packed["pool"].accounting.tokens_in == 11
