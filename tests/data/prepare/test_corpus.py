import ast
import errno
import gzip
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers import documents_of

import ropewalk.data.prepare.corpus as module
from ropewalk.config.data import CorpusConfig, PrepareConfig, SourceConfig
from ropewalk.data.prepare.pipeline import prepare
from ropewalk.data.prepare.sources import corpus_sources, list_units
from ropewalk.data.prepare.tokenizer import load_tokenizer
from ropewalk.errors import UserError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(*paths: Path, shard_bytes: int = 10**9, **settings) -> tuple[dict[str, str], dict[str, int]]:
    """Name -> text, and what was left out."""
    if settings:
        config = CorpusConfig(sources=[SourceConfig("d", str(path), **settings) for path in paths])
    else:
        config = CorpusConfig(paths=[str(path) for path in paths])
    documents, skipped = documents_of(config, shard_bytes)
    names = [document.name for document in documents]
    assert len(set(names)) == len(names)
    return {document.name: document.text for document in documents}, skipped


def digest(*paths: Path) -> list[str]:
    sources = corpus_sources(CorpusConfig(paths=[str(path) for path in paths]))
    for source in sources:
        assert list(list_units(source, 10**9))
    return [source.digest for source in sources]


def test_repositories_are_concatenated_in_path_order(tmp_path):
    root = tmp_path / "lib"
    write(root / "pkg/b.py", "b = 1\n\n\n")
    write(root / "pkg/__init__.py", "")
    write(root / "pkg/a/z.c", "int z;")
    write(root / "pkg/query.sql", "select 1\n")
    write(root / "pkg/README.md", "Read me.")
    write(root / "pkg/__pycache__/b.py", "cached")
    write(root / "alone.py", "alone = 1\n")
    write(root / "pkg/bad.py", b"\xff\xfe")
    write(root / "pkg/data.bin", "no code")
    found, skipped = read(root, kind="repositories")
    assert found == {
        "lib/alone.py": "# alone.py\nalone = 1\n",
        "lib/pkg": "Read me.\n# pkg/__init__.py\n// pkg/a/z.c\nint z;\n# pkg/b.py\nb = 1\n-- pkg/query.sql\nselect 1\n",
    }
    assert skipped == {"not UTF-8": 1, "unknown kind .bin": 1}


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
    write(root / "i.jsonl.zst", pa.compress(b'{"text": "squeezed"}\n', codec="zstd", asbytes=True))
    found, skipped = read(root, write(tmp_path / "alone/a.txt", "prose"))
    assert found == {
        "docs/a.txt": "prose",
        "docs/b.py": "code",
        "docs/c.jsonl:1": "one",
        "docs/c.jsonl:2": "two",
        "docs/d.jsonl.gz:1": "zipped",
        "docs/e.parquet:1": "p",
        "docs/e.parquet:2": "q",
        "docs/i.jsonl.zst:1": "squeezed",
        "a.txt": "prose",
    }
    assert skipped == {"unknown kind .png": 1, "empty": 1, "not UTF-8": 1, "hidden": 1}


def test_links_outwards_are_counted_and_not_followed(tmp_path):
    secret = write(tmp_path / "secret/key.txt", "secret")
    root = tmp_path / "docs"
    write(root / "a.txt", "a")
    (root / "inside.txt").symlink_to(root / "a.txt")
    (root / "outside.txt").symlink_to(secret)
    (root / "directory").symlink_to(secret.parent)
    found, skipped = read(root)
    assert found == {"docs/a.txt": "a", "docs/inside.txt": "a"}
    assert skipped == {"link out of the directory": 1, "linked directory": 1}


def test_a_directory_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """The fault is put in below os.walk, as root may list whatever its permissions are."""
    write(tmp_path / "tree/open/a.py", "a")
    write(tmp_path / "tree/shut/b.py", "b")
    real = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("shut"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"tree/shut cannot be listed \(Permission denied\); make it readable"):
        read(tmp_path / "tree")


def test_repeated_names_are_numbered(tmp_path):
    one, two = write(tmp_path / "1/docs/a.md", "one"), write(tmp_path / "2/docs/a.md", "two")
    assert read(one.parent, two.parent)[0] == {"docs/a.md": "one", "docs#2/a.md": "two"}


def test_large_files_are_read_in_stretches(tmp_path):
    """Each row once, wherever the stretches begin; of parquet by row groups."""
    rows = [f"row {i} {'x' * (i % 17)}" for i in range(60)]
    lines = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": row}) + "\n" for row in rows))
    pq.write_table(pa.table({"text": rows}), tmp_path / "b.parquet", row_group_size=7)
    for size in (1, 25, 26, 27, 100, 10**6):
        assert list(read(lines, shard_bytes=size)[0].values()) == rows
        found = read(tmp_path / "b.parquet", shard_bytes=size)[0]
        assert found == {f"b.parquet:{number}": row for number, row in enumerate(rows, 1)}


def test_what_is_too_large_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 60)
    monkeypatch.setattr(module, "MAX_LINE", 20)
    write(tmp_path / "d/a.txt", "x" * 61)
    write(tmp_path / "d/b.txt", "x" * 21)
    write(tmp_path / "d/c.txt", ("x" * 20 + "\n") * 2)
    rows = ["y" * 100, "z", "y" * 25]
    write(tmp_path / "d/d.jsonl", "".join(json.dumps({"text": row}) + "\n" for row in rows))
    write(tmp_path / "d/e.jsonl", json.dumps({"text": "y" * 200}))
    found, skipped = read(tmp_path / "d")
    assert list(found) == ["d/c.txt", "d/d.jsonl:2"]
    assert skipped == {"too large": 3, "a line too long": 2}
    assert read(tmp_path, kind="repositories") == (
        {f"{tmp_path.name}/d": f"{'x' * 20}\n{'x' * 20}\n"},
        {"too large": 1, "a line too long": 1, "unknown kind .jsonl": 2},
    )


def test_runs_of_spaces_that_no_tokenizer_takes_are_counted(tmp_path, fixture_tokenizer):
    encoder = load_tokenizer(str(fixture_tokenizer))
    longest = "x" + " " * 400_000 + "x"
    write(tmp_path / "d/a.txt", longest)
    write(tmp_path / "d/b.txt", "x" + "\n " * 200_001 + "x")
    found, skipped = read(tmp_path / "d")
    assert found == {"d/a.txt": longest}
    assert skipped == {"too many spaces in a row": 1}
    assert len(encoder.encode_texts([longest])[0]) > 2


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_files_are_named(tmp_path, name):
    lines = "".join(json.dumps({"text": f"{i * i}"}) + "\n" for i in range(5000)).encode()
    packed = gzip.compress(lines) if name.endswith("gz") else pa.compress(lines, codec="zstd", asbytes=True)
    write(tmp_path / name, packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"is damaged after line \d+ .*fetch it again"):
        read(tmp_path / name)


LINES = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(50)).encode()
PACKED = {"": LINES, "gz": gzip.compress(LINES), "zst": zstandard.compress(LINES)}


@pytest.mark.parametrize(("name", "packed"), [
    ("a.jsonl", "gz"), ("a.jsonl", "zst"), ("a.jsonl.gz", ""), ("a.jsonl.gz", "zst"), ("a.jsonl.zst", ""),
    ("a.jsonl.zst", "gz"),
])  # fmt: skip
def test_json_lines_are_read_as_what_they_are(tmp_path, name, packed):
    """Servers and clients that pack or unpack on the way leave the name; only plain lines are read in stretches."""
    write(tmp_path / name, PACKED[packed])
    found, skipped = read(tmp_path / name, shard_bytes=40)
    assert (list(found.values()), skipped) == ([f"row {i}" for i in range(50)], {})


def test_what_is_no_json_lines_says_so(tmp_path):
    write(tmp_path / "d/a.jsonl", json.dumps([{"text": "one"}, {"text": "two"}]))
    assert read(tmp_path / "d")[1] == {"a list, where each line of JSON lines is one row": 1}
    dictionary = zstandard.train_dictionary(512, [f"row {i} of words that all share".encode() * 9 for i in range(999)])
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(LINES)
    with pytest.raises(UserError, match=r"Dictionary mismatch.*; compress it again without a dictionary"):
        read(write(tmp_path / "a.jsonl.zst", packed))


def test_no_document_is_in_two_sources(tmp_path):
    """Held out under the one name, it would be trained under the other."""
    write(tmp_path / "d/in/a.txt", "one")
    (tmp_path / "link").symlink_to(tmp_path / "d/in")
    for inner in ("d", "d/in", "d/in/a.txt", "link"):
        message = rf"{inner} lies in .*d, or is the same, and both are sources.*; name it once"
        with pytest.raises(UserError, match=message):
            corpus_sources(CorpusConfig(paths=[str(tmp_path / "d"), str(tmp_path / inner)]))
    other = [SourceConfig("a", str(tmp_path / "d")), SourceConfig("b", str(tmp_path / "d"), column="summary")]
    assert len(corpus_sources(CorpusConfig(sources=other))) == 2


@pytest.mark.parametrize("saved", [True, False])
def test_datasets(tmp_path, saved):
    """One that save_to_disk() wrote, and a directory of data files as from the hub, streamed."""
    import datasets

    rows = [f"row {i}" for i in range(20)]
    if saved:
        datasets.Dataset.from_dict({"body": rows}).save_to_disk(tmp_path / "set")
    else:
        for part in range(2):
            pq.write_table(pa.table({"body": rows[part * 10 : part * 10 + 10]}), tmp_path / f"set-{part}.parquet")
        (tmp_path / "set").mkdir()
        for path in tmp_path.glob("*.parquet"):
            path.rename(tmp_path / "set" / path.name)
    found, _ = read(tmp_path / "set", kind="dataset", column="body", shard_bytes=100)
    assert list(found.values()) == rows
    with pytest.raises(ValueError, match=r"has the columns \['body'\]; 'text' is none of them"):
        read(tmp_path / "set", kind="dataset")


def test_conversations(tmp_path):
    turns = [{"role": "user", "content": "Hi", "id": 1}, {"role": "assistant", "content": "Ho"}]
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": turns}) + "\n")
    pq.write_table(pa.table({"messages": [turns]}), tmp_path / "b.parquet")
    for file in (path, tmp_path / "b.parquet"):
        (document,), _ = documents_of(CorpusConfig(sources=[SourceConfig("chat", str(file), chat=True)]))
        assert document.messages == tuple(turns)


USER = {"role": "user", "content": "Hi"}
DEEP = "[" * 100_000


LONE_SURROGATE = "not valid Unicode (a lone surrogate)"


@pytest.mark.parametrize(
    ("line", "chat", "reason"),
    [
        ('{"text": ', False, "not JSON"),
        ('{"text": ' + DEEP, False, "nested too deep"),
        ('{"body": "x"}', False, "no column 'text'"),
        ('"text"', False, "not an object with the column 'text'"),
        ('{"text": null}', False, "null"),
        ('{"text": 3}', False, "'text' is int, not text"),
        ('{"text": "\\ud800"}', False, "not valid Unicode (a lone surrogate)"),
        ('{"messages": null}', True, "null"),
        ('{"messages": []}', True, "no messages"),
        ('{"messages": "Hi"}', True, "messages that are not JSON"),
        ('{"messages": {}}', True, "messages that are not a list"),
        ('{"messages": ["Hi"]}', True, "a message that is not an object"),
        ('{"messages": [{"role": "user"}]}', True, "a message without content"),
        ('{"messages": [{"role": "user", "content": null}]}', True, "a message without content"),
        ('{"messages": [{"role": "user", "content": [{"type": ["x"]}]}]}', True, "a content part of type ['x']"),
        ('{"messages": [{"content": "Hi"}]}', True, "a message without a role"),
        ('{"messages": [{"role": "user", "content": 3}]}', True, "a content that is int, not text"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', True, "not valid Unicode (a lone surrogate)"),
        ('{"messages": [{"role": "\\ud800", "content": "Hi"}]}', True, "not valid Unicode (a lone surrogate)"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            True,
            "a content part of type image_url",
        ),
        ('{"messages": [{"from": "x", "value": ""}]}', True, "a role that ShareGPT's form does not have"),
        (json.dumps({"messages": [USER], "tools": "{"}), True, "tools that are not JSON"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": ["\\ud800"]}', True, LONE_SURROGATE),
        (
            json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "content": "misplaced"}]}]}),
            True,
            "a content part of type text without a text",
        ),
        (json.dumps({"messages": [USER], "functions": [{"name": "f"}]}), True, "a column functions, which is not read"),
        (json.dumps({"messages": [USER], "documents": [{"text": "x"}]}), True, "a column documents, which is not read"),
        (json.dumps({"messages": [USER], "images": ["a.png"]}), True, "a column images, which is not read"),
        (
            json.dumps({"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}}),
            True,
            "a column chat_template_kwargs, which is not read",
        ),
        (json.dumps({"messages": [USER], "system": ["x"]}), True, "a system column that is list, not text"),
        (
            json.dumps({"messages": [{"role": "system", "content": "one"}, USER], "system": "two"}),
            True,
            "a system column beside another system message",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_left_out_or_an_error(tmp_path, line, chat, reason):
    """One policy: counted with the first named, whatever the fault; with corpus.bad_rows=error it ends the run."""
    fine = json.dumps({"text": "fine", "messages": [USER]})
    path = write(tmp_path / "a.jsonl", f"{fine}\n{line}\n{line}\n{fine}\n")
    corpus = CorpusConfig(sources=[SourceConfig("d", str(path), chat=chat)])
    documents, skipped = documents_of(corpus)
    assert [document.name for document in documents] == ["a.jsonl:1", "a.jsonl:4"]
    assert skipped == {reason: 2}
    corpus.bad_rows = "error"
    with pytest.raises(
        ValueError, match=rf"a\.jsonl, row 2[^:]*: {re.escape(reason)}; correct it, or set corpus.bad_rows=sk"
    ):
        documents_of(corpus)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_of_conversations_that_are_not_read_are_counted(tmp_path, fixture_tokenizer, suffix):
    talk = [USER, {"role": "assistant", "content": "Ahoy."}]
    rows = [{"messages": talk, "source": "a", "score": 1.0}, {"messages": talk, "source": "b", "score": 0.0}]
    path = tmp_path / f"talks.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": talk, "source": None}]))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    corpus = CorpusConfig(
        name="c", sources=[SourceConfig("talks", str(path), chat=True)], tokenizer=str(fixture_tokenizer),
        chat_template=str(tmp_path / "t.jinja"),
    )  # fmt: skip
    lines = []
    prepare(PrepareConfig(str(tmp_path / "o"), [64], workers=1, corpus=corpus), lines.append)
    assert f"talks.{suffix}: columns of conversations that are not read: 2 score, 2 source" in lines


def test_text_of_the_type_binary_is_text(tmp_path):
    """As Spark writes a column without the UTF8 type."""
    rows = [b"caf\xc3\xa9", None, b"caf\xe9", b"\xef\xbb\xbfmarked"]
    pq.write_table(pa.table({"text": pa.array(rows, pa.binary())}), tmp_path / "a.parquet")
    found, skipped = read(tmp_path / "a.parquet", shard_bytes=10**9, kind="files")
    assert found == {"a.parquet:1": "café", "a.parquet:4": "marked"}
    assert skipped == {"null": 1, "not UTF-8": 1}
    pq.write_table(pa.table({"messages": pa.array([json.dumps([USER]).encode()], pa.binary())}), tmp_path / "b.parquet")
    documents, _ = documents_of(CorpusConfig(sources=[SourceConfig("d", str(tmp_path / "b.parquet"), chat=True)]))
    assert [document.messages for document in documents] == [(USER,)]


def test_columns_that_pyarrow_does_not_convert(tmp_path):
    """A time past the year 9999 is a bad row, a name that two columns have a fault of the file."""
    pq.write_table(pa.table({"text": pa.array([2**62], pa.timestamp("us"))}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", shard_bytes=10**9, kind="files") == ({}, {"a value out of range": 1})
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has 2 columns 'text'; write it with one of them"):
        read(tmp_path / "b.parquet", shard_bytes=10**9, kind="files")


def test_the_forms_of_conversations(tmp_path):
    """ShareGPT's names, parts of text, a system's prompt in a column of its own; what is null or empty is not there."""
    call = [{"type": "function", "function": {"name": "multiply", "arguments": '{"a": 3, "b": 4}'}}]
    rows = [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "Be brief."},
        {"messages": json.dumps([{"role": "user", "content": [{"type": "text", "text": c} for c in "Hi"]}])},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": call, "name": None}], "tools": "[1]"},
    ]
    lines = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    documents, skipped = documents_of(CorpusConfig(sources=[SourceConfig("chat", str(lines), chat=True)]))
    assert skipped == {}
    assert [list(document.messages) for document in documents] == [
        [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Ho"}],
        [USER],
        [USER, {"role": "assistant", "content": "", "tool_calls": call}],
    ]
    assert [document.tools for document in documents] == [None, None, [1]]
    pq.write_table(pa.table({"conversations": [rows[0]["conversations"]]}), tmp_path / "b.parquet")
    documents, _ = documents_of(CorpusConfig(sources=[SourceConfig("chat", str(tmp_path / "b.parquet"), chat=True)]))
    assert documents[0].messages == (USER, {"role": "assistant", "content": "Ho"})


def test_other_suffixes_are_text_where_a_source_names_them(tmp_path):
    write(tmp_path / "d/a.yaml", "a: 1\n")
    write(tmp_path / "d/b.g4", "grammar b;\n")
    found, skipped = read(tmp_path / "d", suffixes=[".yaml"])
    assert (found, skipped) == ({"d/a.yaml": "a: 1\n"}, {"unknown kind .g4": 1})
    found, _ = read(tmp_path, kind="repositories", suffixes=[".yaml", ".g4"])
    assert found == {f"{tmp_path.name}/d": "// d/a.yaml\na: 1\n// d/b.g4\ngrammar b;\n"}


def test_a_column_of_paths(tmp_path):
    pq.write_table(pa.table({"content": ["p"]}), tmp_path / "a.parquet")
    documents, _ = documents_of(CorpusConfig(paths=[str(tmp_path / "a.parquet")], column="content"))
    assert [document.text for document in documents] == ["p"]
    with pytest.raises(ValueError, match=r"name the one with the documents \(column=, or corpus.column\)"):
        documents_of(CorpusConfig(paths=[str(tmp_path / "a.parquet")]))


def test_each_file_is_looked_at_once_as_it_is(tmp_path):
    """What a git checkout may hold; a FIFO would be waited for without end."""
    root = tmp_path / "d"
    write(root / "a.txt", b"\xef\xbb\xbfmarked")
    (root / "dangling.txt").symlink_to("missing.txt")
    (root / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(root / "fifo.txt")
    write(Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.txt")), "x")
    counts = {"dangling link": 1, "link loop": 1, "not a regular file": 1, "name not UTF-8": 1}
    assert read(root) == ({"d/a.txt": "marked"}, counts)
    write(root / "pkg/b.py", b"\xef\xbb\xbfb = 1\n")
    found, skipped = read(root, kind="repositories")
    assert found == {"d/a.txt": "marked\n", "d/pkg": "# pkg/b.py\nb = 1\n"}
    assert skipped == counts
    with pytest.raises(ValueError, match=r"fifo.txt, which is neither a directory nor a regular file"):
        read(root / "fifo.txt")
    with pytest.raises(ValueError, match=r"loop.txt, which cannot be read \(Too many levels of symbolic links\)"):
        read(root / "loop.txt")


def test_an_unreadable_file_is_counted(tmp_path, monkeypatch):
    """The fault is put in below, as root may read whatever its permissions are."""
    write(tmp_path / "d/a.txt", "a")
    write(tmp_path / "d/b.txt", "b")
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("b.txt"))
    assert read(tmp_path / "d") == ({"d/a.txt": "a"}, {"unreadable": 1})


def test_a_snapshot_of_the_hubs_cache(tmp_path):
    """Links to blobs whose names have no suffix: as a directory, and as one file."""
    cache = tmp_path / "datasets--a--b"
    lines = b"".join(json.dumps({"text": f"row {i}"}).encode() + b"\n" for i in range(3))
    snapshot = cache / "snapshots/0123abcd"
    (snapshot / "data").mkdir(parents=True)
    for blob, name, content in (
        ("1f", "data/train.jsonl.gz", gzip.compress(lines)), ("2f", "plain.jsonl", lines), ("3f", "README.md", b"Read")
    ):  # fmt: skip
        write(cache / "blobs" / blob, content)
        (snapshot / name).symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", blob))
    rows = [f"row {i}" for i in range(3)]
    found, skipped = read(snapshot)
    assert list(found.values()) == ["Read", *rows, *rows]
    assert skipped == {}
    found, _ = read(snapshot / "data/train.jsonl.gz")
    assert found == {f"train.jsonl.gz:{number}": row for number, row in enumerate(rows, 1)}


def test_zstd_with_a_long_window_is_read(tmp_path):
    """As of zstd --long=31 from a pipe: Reddit's and the Pile's dumps. Several frames follow each other."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True)
    frames = []
    for text in ("one", "two"):
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        frames.append(compressor.compress(json.dumps({"text": text}).encode() + b"\n") + compressor.flush())
    path = write(tmp_path / "a.jsonl.zst", b"".join(frames))
    assert zstandard.get_frame_parameters(frames[0]).window_size == 2**31
    assert list(read(path)[0].values()) == ["one", "two"]


def test_what_the_datasets_library_raises_is_one_line(tmp_path):
    write(tmp_path / "set/a.jsonl", '{"text": "one"}\n')
    with pytest.raises(
        ValueError, match=r"^the dataset .*set cannot be read: ValueError: Bad split: validation.*check pa"
    ):
        read(tmp_path / "set", kind="dataset", split="validation")


def test_what_cannot_be_a_source_is_refused(tmp_path):
    def refused(message, **settings):
        with pytest.raises(ValueError, match=message):
            corpus_sources(CorpusConfig(**settings))

    refused(r"corpus.paths names .*missing, which does not exist", paths=[str(tmp_path / "missing")])
    refused(r"corpus.sources names nowhere, which does not", sources=[SourceConfig("d", "nowhere")])
    refused("kind of a source=zip is not known", sources=[SourceConfig("d", str(tmp_path), "zip")])
    refused("hub dataset a/b without a revision", sources=[SourceConfig("d", "a/b", "dataset")])
    refused("repositories and chat", sources=[SourceConfig("d", str(tmp_path), "repositories", chat=True)])
    pq.write_table(pa.table({"body": ["p"]}), tmp_path / "e.parquet")
    with pytest.raises(
        ValueError, match=r"has the columns \['body'\]; name the one with the documents .*: 'text' is none"
    ):
        read(tmp_path / "e.parquet")


def test_the_digest_follows_names_and_contents(tmp_path):
    path = write(tmp_path / "a/a.txt", "one")
    before = digest(path.parent)
    path.touch()
    assert digest(path.parent) == before
    write(path, "two")
    changed = digest(path.parent)
    assert changed != before
    path.rename(path.with_name("b.txt"))
    assert digest(path.parent) not in (before, changed)


def test_the_standard_library_is_code():
    documents, _ = documents_of(CorpusConfig(stdlib=True))
    found = {document.name: document.text for document in documents}
    assert {"stdlib/json", "stdlib/ast.py", "stdlib/email"} <= found.keys()
    assert not any("site-packages" in name or "__pycache__" in name for name in found)
    assert found["stdlib/ast.py"].startswith("# ast.py\n")
    ast.parse(found["stdlib/textwrap.py"])
    assert Path(json.__file__).read_text().rstrip() in found["stdlib/json"]
