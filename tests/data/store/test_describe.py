"""What is printed of a store, against counting by hand."""

import numpy as np
import pandas as pd
import pytest
from helpers import composed

from ropewalk.data import PackedSequence, PackedStore
from ropewalk.data.store.describe import describe, length_census, print_store
from ropewalk.data.store.writer import Accounting, write_store
from ropewalk.figures.length_census import length_census_figure


@pytest.fixture
def store(tmp_path, fixture_tokenizer):
    """Two domains of 16 tokens a sequence: pieces of 3, 5, 8 and of 15 with one token of padding; and of 16."""
    tokens = np.arange(40, 56, dtype=np.uint32)
    mixed = [PackedSequence(tokens, np.array([3, 8, 16], np.int32)), PackedSequence(tokens, np.array([15], np.int32))]
    whole = [PackedSequence(tokens, np.array([16], np.int32))]
    accounts = {"mixed": Accounting(40, moved={"whole": 2}, dropped={"too short": 7}), "whole": Accounting(16)}
    return write_store(tmp_path / "store", 16, {"mixed": mixed, "whole": whole}, fixture_tokenizer, accounts)


def test_lengths_of_pieces(store):
    assert store.piece_lengths("mixed").tolist() == [3, 5, 8, 15]
    assert store.piece_lengths("whole").tolist() == [16]


def test_counts_and_histogram(store):
    lines = list(describe(store, None, 0))
    text = "\n".join(lines)
    assert f"fingerprint {store.fingerprint}" in text
    row = next(line for line in lines if line.startswith("mixed "))
    assert row.split() == ["mixed", "2", "4", "31", "27", "96.88%"]  # 31 of 32 places
    assert "mixed: 40 tokens came in, 31 packed" in text
    assert "  2 moved to whole" in text
    assert "  7 dropped: too short" in text
    bars = [line for line in lines if " pieces " in line and "sequence" not in line]
    assert [line.split()[3] for line in bars[:3]] == ["1", "1", "2"]  # of 2-3, 4-7 and 8-15 tokens
    assert [line.split()[5] for line in bars[:3]] == ["9.7%", "16.1%", "74.2%"]  # 3, 5 and 23 of 31


def test_a_census_counts_tokens_by_length_and_domain(store, tmp_path):
    """Pieces of 3, 5, 8 and 15 tokens, and one of 16; the empty length in between would have a row too."""
    print_store(composed("inspect_store", f"store={store.root}", f"figures={tmp_path / 'figures'}"))
    census = pd.read_csv(tmp_path / "figures" / "length_census.csv")
    columns = ["domain", "length_from", "length_to", "pieces", "tokens"]
    assert census[columns].to_numpy().tolist() == [
        ["mixed", 2, 3, 1, 3], ["mixed", 4, 7, 1, 5], ["mixed", 8, 15, 2, 23], ["whole", 16, 31, 1, 16]
    ]  # fmt: skip
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".csv", ".svg", ".png"}
    numbers = length_census_figure(census).numbers
    assert numbers.loc["mixed"].tolist() == ["4", "31", "8"]  # 15.5 of its 31 tokens are reached at 8 to 15
    gap = length_census([write_store(tmp_path / "gap", 16, {"d": [PackedSequence(
        np.arange(40, 56, dtype=np.uint32), np.array([1, 16], np.int32))]}, store.tokenizer_path,
        {"d": Accounting(16)})])  # fmt: skip
    assert gap["pieces"].tolist() == [1, 0, 0, 1]  # of 1, 2 to 3, 4 to 7, 8 to 15 tokens


def test_a_sequence_is_decoded_with_its_boundaries(store):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path)
    lines = list(describe(store, "mixed", 1))
    assert "sequence 1 of mixed, 1 pieces:" in lines
    assert lines[-2] == f"  [      0,      15)  {tokenizer.decode(list(range(40, 55)))!r}"
    assert lines[-1] == "  1 tokens of padding"


def test_what_is_trained_of_a_conversation_is_shown(fixture_tokenizer, tmp_path):
    """Of pieces of 6 and 4 tokens, two and one stretches; the first token of a piece is never predicted."""
    tokens, mask = np.arange(40, 50, dtype=np.uint32), np.zeros(10, dtype=bool)
    mask[[0, 1, 3, 4, 6, 7, 8, 9]] = True
    sequence = PackedSequence(tokens, np.array([6, 10], dtype=np.int32), mask)
    store = write_store(tmp_path / "s", 10, {"chat": [sequence]}, fixture_tokenizer, {"chat": Accounting(10)})
    lines = [line for line in describe(store, None, 0) if "trained [" in line]
    spans = [line.partition(")")[0].split("[")[1].replace(" ", "") for line in lines]
    assert spans == ["1,2", "3,5", "7,10"]
    assert store.read("chat", 0).trained_tokens == sum(end - start for start, end in ((1, 2), (3, 5), (7, 10)))


def test_a_directory_of_stores_is_listed(fixture_tokenizer, tmp_path, capsys):
    """By inspection; what opens a store names those that are there."""
    for length in (4, 8):
        sequence = PackedSequence(np.full(length, 40, np.uint32), np.array([length], np.int32))
        write_store(
            tmp_path / f"packed-{length}", length, {"d": [sequence]}, fixture_tokenizer, {"d": Accounting(length)}
        )
    print_store(composed("inspect_store", f"store={tmp_path}"))
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert rows[1:3] == [["packed-4", "d", "1"], ["packed-8", "d", "1"]]
    with pytest.raises(ValueError, match=r"is not a packed store: it holds some; name one of .*packed-4, .*packed-8"):
        PackedStore(tmp_path)
    file = tmp_path / "packed-4" / "d" / "tokens-00000.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"packed-4.* is corrupt: its SHA-256 differs"):
        print_store(composed("inspect_store", f"store={tmp_path}", "verify=true"))


@pytest.mark.parametrize(("domain", "sequence", "message"), [
    ("books", 0, "domain=books is not in the store; it has: mixed, whole"), ("whole", 1, r"outside 0 \.\. 0 of whole"),
])  # fmt: skip
def test_what_is_not_there_is_named(store, domain, sequence, message):
    with pytest.raises(ValueError, match=message):
        list(describe(store, domain, sequence))


def test_verify_hashes_again(store, capsys):
    config = composed("inspect_store", f"store={store.root}", "verify=true")
    print_store(config)
    assert capsys.readouterr().out.endswith("verified: every file has the size and SHA-256 of the manifest\n")
    file = store.root / "whole" / "tokens-00000.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="is corrupt: its SHA-256 differs"):
        print_store(config)
    assert PackedStore(store.root).piece_lengths("whole").tolist() == [16]
