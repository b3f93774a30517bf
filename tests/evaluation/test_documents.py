from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from ropewalk.errors import UserError
from ropewalk.evaluation.documents import Document, find_documents, make_windows


def test_windows_are_bos_and_the_first_tokens(documents, tokenizer) -> None:
    windows = make_windows(documents, tokenizer, 512)
    text = json.loads((documents / "heldout" / "documents.jsonl").read_text().splitlines()[1])["text"]
    ids = windows.tokens["doc-1"].tolist()
    assert len(ids) == 512
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text[:511]


def test_windows_begin_as_the_tokenizers_own_encode_does(documents, tokenizer) -> None:
    """SmolLM2 has a BOS that it never puts before a text."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": False}
    without = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    ids = make_windows(documents, without, 512).tokens["doc-1"].tolist()
    text = json.loads((documents / "heldout" / "documents.jsonl").read_text().splitlines()[1])["text"]
    assert tokenizer.decode(ids) == text[:512]


def test_what_is_left_out_is_counted(documents, tokenizer) -> None:
    windows = make_windows(documents, tokenizer, 512, max_documents=2)
    assert list(windows.tokens) == ["doc-0", "doc-1"]
    assert windows.counts() == {
        "used": 2,
        "too_short": 0,
        "too_short_tokens": {},
        "beyond_max_documents": 2,
        "window": 512,
    }
    everything = make_windows(documents, tokenizer, 512).counts()
    assert everything["used"] == 3
    assert list(everything["too_short_tokens"]) == ["short"]


def test_the_directory_of_the_jsonl_itself_is_accepted(documents) -> None:
    direct = [document.name for document in find_documents(documents / "heldout")]
    assert direct == [document.name for document in find_documents(documents)]


def test_text_files_are_named_by_their_path(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.py").write_text("not text")
    assert [tuple(document) for document in find_documents(tmp_path)] == [
        ("a.txt", "first"),
        ("b/two.md", "second"),
    ]


def test_no_document_long_enough_names_the_longest(documents, tokenizer) -> None:
    longest = max((len(document.text) + 1, document.name) for document in find_documents(documents))
    with pytest.raises(ValueError, match=rf"lengths=100000 .*'{longest[1]}', has {longest[0]} tokens"):
        make_windows(documents, tokenizer, 100_000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"name": "a", "text": "x"}\n{"name": "a", "text": "y"}\n', "two documents named 'a'"),
        ('{"name": "a"}\n', "line 1 is not a document"),
        ("nonsense\n", "line 1 is not a document"),
        ('{"name": "a", "text": null}\n', "line 1 is not a document"),
        ('{"name": null, "text": "x"}\n', "line 1 is not a document"),
        ('\n{"name": "a", "text": ["x"]}\n', "line 2 is not a document"),
        ("[" * 100_000, "line 1 is not a document"),
        ('{"name": "a", "text": "\\ud83d"}\n', "documents.jsonl, line 1' has a name or text that is not valid Unicode"),
        ("", "holds no document"),
    ],
)
def test_damaged_documents_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "documents.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(find_documents(tmp_path))


def test_a_byte_order_mark_and_blank_lines_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert list(find_documents(tmp_path)) == [Document("a.txt", "one\ntwo\n")]
    (tmp_path / "documents.jsonl").write_bytes(b'\xef\xbb\xbf{"name": "a", "text": "x\xe2\x80\xa8y"}\r\n\n')
    assert list(find_documents(tmp_path)) == [Document("a", "x\u2028y")]


def test_documents_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt cannot be read .*; save it as text in UTF-8, or move it away"):
        list(find_documents(tmp_path))
    (tmp_path / "documents.jsonl").write_bytes(b'{"name": "a", "text": "caf\xe9"}')
    with pytest.raises(UserError, match="line 1 is not a document"):
        list(find_documents(tmp_path))


def test_files_that_are_not_there_or_have_no_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("missing.txt")
    with pytest.raises(UserError, match=r"a\.txt is not a file that can be read; save it as text"):
        list(find_documents(tmp_path))
    (tmp_path / "a.txt").unlink()
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt"), "w") as file:
        file.write("x")
    with pytest.raises(UserError, match="has a name or text that is not valid Unicode"):
        list(find_documents(tmp_path))
