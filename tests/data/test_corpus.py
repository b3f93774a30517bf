import ast
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ropewalk.data.corpus import Corpus, add_packages, load_corpus


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(corpus: Corpus) -> dict[str, str]:
    return {document.name: document.text for document in corpus.documents}


def test_packages_are_concatenated_in_path_order(tmp_path):
    write(tmp_path / "pkg/b.py", "b = 1\n\n\n")
    write(tmp_path / "pkg/__init__.py", "")
    write(tmp_path / "pkg/a/z.py", "z = 1")
    write(tmp_path / "pkg/__pycache__/b.py", "cached")
    write(tmp_path / "site-packages/other/x.py", "installed")
    write(tmp_path / "alone.py", "alone = 1\n")
    write(tmp_path / "pkg/bad.py", b"\xff\xfe")
    write(tmp_path / "pkg/data.txt", "no code")
    corpus = Corpus()
    add_packages(corpus, tmp_path, "lib")
    assert texts(corpus) == {
        "lib/alone.py": "# alone.py\nalone = 1\n",
        "lib/pkg": "# pkg/__init__.py\n# pkg/a/z.py\nz = 1\n# pkg/b.py\nb = 1\n",
    }
    assert +corpus.skipped == {"not UTF-8": 1}


def test_every_kind_of_file(tmp_path):
    root = tmp_path / "docs"
    write(root / "a.txt", "prose")
    write(root / "b.py", "code")
    write(root / "c.jsonl", '{"text": "one", "n": 1}\n{"text": "two"}\n')
    write(root / "d.jsonl.gz", gzip.compress(json.dumps({"text": "zipped"}).encode()))
    pq.write_table(pa.table({"text": ["p", "q"], "n": [1, 2]}), root / "e.parquet")
    write(root / "f.png", b"\x89PNG")
    write(root / "g.md", "  \n")
    write(root / "h.rst", b"\xff")
    write(root / ".git/x.txt", "hidden")
    corpus = load_corpus(False, [str(root), str(root / "a.txt")])
    assert texts(corpus) == {
        "docs/a.txt": "prose",
        "docs/b.py": "code",
        "docs/c.jsonl:1": "one",
        "docs/c.jsonl:2": "two",
        "docs/d.jsonl.gz:1": "zipped",
        "docs/e.parquet:1": "p",
        "docs/e.parquet:2": "q",
        "a.txt": "prose",
    }
    assert +corpus.skipped == {"unknown kind .png": 1, "empty": 1, "not UTF-8": 1, "hidden": 1}


def test_links_outwards_are_counted_and_not_followed(tmp_path):
    secret = write(tmp_path / "secret/key.txt", "secret")
    root = tmp_path / "docs"
    write(root / "a.txt", "a")
    (root / "inside.txt").symlink_to(root / "a.txt")
    (root / "outside.txt").symlink_to(secret)
    (root / "directory").symlink_to(secret.parent)
    corpus = load_corpus(False, [str(root)])
    assert texts(corpus) == {"docs/a.txt": "a", "docs/inside.txt": "a"}
    assert +corpus.skipped == {"link out of the directory": 1, "linked directory": 1}


def test_repeated_names_are_numbered(tmp_path):
    one, two = write(tmp_path / "1/docs/a.md", "one"), write(tmp_path / "2/docs/a.md", "two")
    corpus = load_corpus(False, [str(one.parent), str(two.parent)])
    assert texts(corpus) == {"docs/a.md": "one", "docs/a.md#2": "two"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 2, is not a JSON object with a 'text'"),
        ('{"body": "x"}', "line 2, is not a JSON object with a 'text'"),
        ('"text"', "line 2, is not a JSON object with a 'text'"),
        ('{"text": null}', "row 2: 'text' is NoneType, not a string"),
        ('{"text": "\\ud800"}', "row 2: 'text' is not valid Unicode"),
    ],
)
def test_damaged_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_corpus(False, [str(path)])


def test_what_cannot_be_a_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"corpus.paths names .*missing, which does not exist"):
        load_corpus(False, [str(tmp_path / "missing")])
    with pytest.raises(ValueError, match=r"set corpus.stdlib=true or corpus.paths"):
        load_corpus(False, [])
    pq.write_table(pa.table({"body": ["p"]}), tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=r"has the columns \['body'\]; name the one with the documents 'text'"):
        load_corpus(False, [str(tmp_path / "e.parquet")])


def test_the_hash_follows_names_and_texts(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    before = load_corpus(False, [str(path)]).sha256
    assert load_corpus(False, [str(path)]).sha256 == before
    write(path, "two")
    assert load_corpus(False, [str(path)]).sha256 != before


def test_the_standard_library_is_code():
    corpus = load_corpus(True, [])
    found = texts(corpus)
    assert {"stdlib/json", "stdlib/ast.py", "stdlib/email"} <= found.keys()
    assert not any("site-packages" in name or "__pycache__" in name for name in found)
    assert found["stdlib/ast.py"].startswith("# ast.py\n")
    ast.parse(found["stdlib/textwrap.py"])
    assert Path(json.__file__).read_text().rstrip() in found["stdlib/json"]
