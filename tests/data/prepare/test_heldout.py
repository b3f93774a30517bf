import numpy as np
import pytest

from ropewalk.config.data import CorpusConfig
from ropewalk.data.prepare.corpus import Document
from ropewalk.data.prepare.prepare_plan import choose_heldout


class Words:
    """An encoder that counts words, and remembers what it was made without."""

    def __init__(self, excluded):
        self.excluded = tuple(excluded)

    def encode_documents(self, documents):
        return [np.zeros(len("".join(parts).split()), dtype=np.uint32) for parts in documents]


def documents_of(sizes: list[int], word: str) -> list[Document]:
    return [Document(f"document {number}", (word * size,)) for number, size in enumerate(sizes)]


def choose(documents, count, length):
    made = []

    def make(excluded):
        made.append(Words(excluded))
        return made[-1]

    encoder, chosen = choose_heldout(
        documents, CorpusConfig(name="c", heldout_documents=count, heldout_length=length), make
    )
    assert encoder is made[-1]
    return made, chosen


def test_chosen_documents_are_long_enough_and_unseen():
    documents = documents_of([5, 100, 200, 300, 8, 400], "word ")
    made, chosen = choose(documents, 2, 50)
    assert len(chosen) == 2
    assert set(chosen) <= {1, 2, 3, 5}
    assert set(chosen) <= set(made[-1].excluded)
    assert all(len(tokens) == len(documents[index].text.split()) for index, tokens in chosen.items())


def test_more_are_set_aside_until_enough_are_long():
    """Long words make all but the last document look long; only two have the 20 words."""
    documents = documents_of([10, 10, 25, 10, 10, 30, 10, 10, 0], "w" * 30 + " ")
    made, chosen = choose(documents, 2, 20)
    assert set(chosen) == {2, 5}
    assert set(chosen) <= set(made[-1].excluded)
    assert [len(encoder.excluded) for encoder in made] == [2, 4, 8][: len(made)]


def test_very_long_documents_stay_in_training_where_others_do():
    documents = documents_of([200_000, 100, 200_000, 100, 200_000], "wor ")
    _, chosen = choose(documents, 2, 100)
    assert set(chosen) == {1, 3}


def test_the_choice_follows_names_not_places():
    documents = documents_of([100] * 9, "word ")
    _, chosen = choose(documents, 3, 50)
    _, reverse = choose(documents[::-1], 3, 50)
    names = {documents[index].name for index in chosen}
    assert names == {documents[::-1][index].name for index in reverse}


def test_none_means_none():
    made, chosen = choose(documents_of([100] * 3, "word "), 0, 50)
    assert chosen == {}
    assert made[0].excluded == ()


def test_one_document_is_left_to_train_on():
    with pytest.raises(ValueError, match=r"heldout_documents=3, but of 3 documents, one .* only 2 have"):
        choose(documents_of([100] * 3, "word "), 3, 50)


def test_too_few_long_documents_are_counted():
    with pytest.raises(ValueError, match=r"heldout_documents=2, but of 4 documents, .* only 1 have .*_length=50"):
        choose(documents_of([3, 10, 100, 20], "w" * 30 + " "), 2, 50)
