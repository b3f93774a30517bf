"""The directory that a preparation or conversion writes: one writer, a full disk, and what comes next."""

import json
import os
import re
import resource
import shlex
import threading
from dataclasses import replace

import pytest
from helpers import composed

from ropewalk.config.data import ConvertConfig, CorpusConfig, PrepareConfig, SourceConfig
from ropewalk.data import PackedStore
from ropewalk.data.mds.convert import convert
from ropewalk.data.prepare.pipeline import prepare
from ropewalk.errors import UserError
from ropewalk.files import only_writer


def config_of(output, path, tokenizer, **settings):
    corpus = CorpusConfig(name="c", sources=[SourceConfig("text", str(path))], tokenizer=str(tokenizer))
    return PrepareConfig(str(output), [64], workers=1, corpus=corpus, **settings)


@pytest.fixture
def documents(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.txt").write_text("Some text of a document.\n" * 200)
    return tmp_path / "docs"


def test_other_work_does_not_clear_an_output_that_is_being_written(documents, fixture_tokenizer, tmp_path):
    """Another seed into the output of a live preparation: it used to remove its files and finish."""
    output = tmp_path / "o"
    with only_writer(output, "output=o"):  # as a process that prepares holds it
        (output / "preparing.json").write_text(json.dumps({"sha256": "of the other"}))
        (output / "work").mkdir()
        (output / "work/tokens-00000.bin").write_bytes(b"x")
        for stage in ("all", "plan"):
            with pytest.raises(UserError, match=rf"output=.*o is being written by process {os.getpid()} on .*; wait"):
                prepare(config_of(output, documents, fixture_tokenizer, stage=stage, seed=1), lambda line: None)
        with pytest.raises(UserError, match=r"is being written by process"):
            convert(ConvertConfig(str(output), "mds", store=str(made(documents, fixture_tokenizer, tmp_path / "s"))))
        assert (output / "work/tokens-00000.bin").read_bytes() == b"x"
    prepare(config_of(output, documents, fixture_tokenizer, seed=1), lambda line: None)
    assert not (output / "owner.json").exists()


def made(documents, tokenizer, output):
    return prepare(config_of(output, documents, tokenizer), lambda line: None) / "packed-64"


def test_the_same_command_twice_makes_it_once(documents, fixture_tokenizer, tmp_path):
    """One does the work, the other says so; a share of an array that runs twice likewise."""
    outcomes = []

    def run():
        try:
            prepare(config_of(tmp_path / "o", documents, fixture_tokenizer), lambda line: None)
            outcomes.append("made")
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "made" in outcomes
    assert all(re.fullmatch(r"made|.* is being written by .*", outcome) for outcome in outcomes), outcomes
    PackedStore(tmp_path / "o/packed-64").verify()
    prepare(config_of(tmp_path / "p", documents, fixture_tokenizer, stage="plan"), lambda line: None)
    with (
        only_writer(tmp_path / "p/work", "output=p", "tokenize-0-of-1-owner.json"),
        pytest.raises(UserError, match=r"output=.*p, tokenize-0-of-1 is being written by"),
    ):
        prepare(config_of(tmp_path / "p", documents, fixture_tokenizer, stage="tokenize"), lambda line: None)


def test_what_a_killed_process_leaves_is_no_hindrance(documents, fixture_tokenizer, tmp_path):
    """Of its temporary files, before it has marked the output as its work's; files of anyone else are."""
    output = tmp_path / "o"
    output.mkdir()
    for name in ("preparing.json.0a1b2c3d.partial", "owner.json.0a1b2c3d", "owner.json"):
        (output / name).write_text('{"host": "elsewhere", "pid": 1, "started": "1", "id": "x"}')
        os.utime(output / name, (0, 0))
    PackedStore(made(documents, fixture_tokenizer, output)).verify()
    (tmp_path / "p").mkdir()
    (tmp_path / "p/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"p has files that are not this command's; remove them or set output="):
        made(documents, fixture_tokenizer, tmp_path / "p")


@pytest.mark.parametrize(("name", "content"), [("prepared.json", ""), ("prepared.json", "[]"), ("preparing.json", "{")])
def test_a_mark_that_is_torn_is_named(documents, fixture_tokenizer, tmp_path, name, content):
    """As a copy that was cut short leaves it."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / name).write_text(content)
    with pytest.raises(UserError, match=rf"o/{name} is not (a )?JSON.*; correct it, or move it away"):
        made(documents, fixture_tokenizer, tmp_path / "o")


def test_an_output_in_its_own_corpus_is_no_part_of_it(documents, fixture_tokenizer, tmp_path):
    """Its held-out documents would be trained by a call that goes on, and finished work would be of another corpus."""
    write_many = [(documents / f"{name}.txt").write_text(f"{name} and more text.\n" * 100) for name in "bcd"]
    corpus = CorpusConfig(
        paths=[str(documents)], tokenizer=str(fixture_tokenizer), heldout_documents=1, heldout_length=64
    )
    config = PrepareConfig(str(documents / "o"), [64], workers=1, corpus=corpus, stage="plan")
    prepare(config, lambda line: None)
    lines: list[str] = []
    for _ in range(2):
        prepare(replace(config, stage="all"), lines.append)
    assert [line[:15] for line in lines if line.startswith("corpus: ")] == [f"corpus: {1 + len(write_many)} units"] * 2
    assert any(line.endswith("holds this work already; remove it to make it again") for line in lines)


def test_a_full_disk_is_one_line_with_the_space(documents, fixture_tokenizer, tmp_path):
    """A file that cannot grow past 4 kB; what stands is gone on with when there is space."""
    config = config_of(tmp_path / "o", documents, fixture_tokenizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"output=.*o cannot be written \(File too large: .*; about .* GB needed, "):
            prepare(config, lambda line: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    PackedStore(prepare(config, lambda line: None) / "packed-64").verify()
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        UserError,
        match=r"output=.*file cannot be written \(File exists: .*; free space there, or name another directory",
    ):
        prepare(config_of(tmp_path / "file", documents, fixture_tokenizer), lambda line: None)


@pytest.mark.parametrize("name", ["o", "my ö (1), it's = #2"])
def test_the_end_prints_the_commands_that_come_next(documents, fixture_tokenizer, tmp_path, name):
    """They compose, and name this store, also where a shell or Hydra would read its name otherwise."""
    lines: list[str] = []
    output = prepare(config_of(tmp_path / name, documents, fixture_tokenizer), lines.append)
    look, train = [shlex.split(line.removeprefix("next: ")) for line in lines if line.startswith("next: ")]
    assert look == ["python", "data_prep/inspect_store.py", f"store={output}/packed-64"]
    assert train[:2] == ["python", "train.py"]
    config = composed("train", *train[2:])
    assert (config.data.store, config.data.sequence_length) == (f"{output}/packed-64", 64)
    assert config.data.mixture == {"text": 1.0}
