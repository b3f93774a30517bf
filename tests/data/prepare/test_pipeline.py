import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import composed, documents_of

from ropewalk.config.data import CorpusConfig, DomainConfig, PrepareConfig, SourceConfig
from ropewalk.data import PackedStore
from ropewalk.data.prepare.pipeline import Processes, prepare
from ropewalk.data.prepare.token_files import TokenFileWriter
from ropewalk.data.prepare.tokenizer import load_tokenizer
from ropewalk.data.store.writer import PartWriter

TOKENIZER = Path(__file__).parents[2] / "fixtures/tokenizer"


def config_of(output: Path, corpus: Path, **changes) -> PrepareConfig:
    settings = {"vocab_size": 512, "retrieval_tokens": 3000, "heldout_documents": 2, "heldout_length": 1500}
    lengths = changes.pop("sequence_lengths", [128, 256])
    names = ("seed", "shard_mb", "workers", "stage", "shard", "n_shards")
    others = {name: changes.pop(name) for name in names if name in changes}
    return PrepareConfig(
        output=str(output),
        sequence_lengths=lengths,
        **others,
        corpus=CorpusConfig(name="test", paths=[str(corpus)], **{**settings, **changes}),
    )


def contents(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, fixture_corpus):
    output = tmp_path_factory.mktemp("prepare") / "output"
    lines: list[str] = []
    prepare(config_of(output, fixture_corpus), lines.append)
    return output, lines


def test_every_token_of_the_corpus_is_in_the_store(prepared, fixture_corpus):
    """The multiset of tokens of long and short equals that of the documents encoded alone."""
    output, _ = prepared
    encoder = load_tokenizer(str(output / "tokenizer"))
    held = {json.loads(line)["name"] for line in (output / "heldout/documents.jsonl").read_text().splitlines()}
    documents, _ = documents_of(CorpusConfig(paths=[str(fixture_corpus)]))
    training = [document for document in documents if document.name not in held]
    expected = np.concatenate([encoder.encode_document(document.text) for document in training])
    for length in (128, 256):
        store = PackedStore(output / f"packed-{length}")
        store.verify()
        packed = [
            sequence.tokens[: sequence.ends[-1]]
            for name in ("long", "short")
            for sequence in (store.read(name, i) for i in range(store.domains[name].sequences))
        ]
        np.testing.assert_array_equal(np.sort(np.concatenate(packed)), np.sort(expected))


def test_long_and_short_are_split_by_length(prepared):
    store = PackedStore(prepared[0] / "packed-256")
    long, short = store.domains["long"], store.domains["short"]
    assert long.sequences == long.documents
    assert long.padding == 0
    assert store.accounting["long"]["moved"]["short"] + long.tokens == store.accounting["long"]["tokens_in"]
    ends = [store.read("short", i).ends for i in range(short.sequences)]
    assert max(np.diff(e, prepend=0).max() for e in ends) < 256
    assert store.domains["retrieval"].tokens >= 3000


def test_held_out_documents_are_long_and_nowhere_else(prepared, fixture_corpus):
    output, _ = prepared
    encoder = load_tokenizer(str(output / "tokenizer"))
    manifest = json.loads((output / "heldout/manifest.json").read_text())
    data = (output / "heldout/documents.jsonl").read_bytes()
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest()
    documents = [json.loads(line) for line in data.decode().splitlines()]
    assert len(documents) == 2
    for document, listed in zip(documents, manifest["documents"], strict=True):
        tokens = encoder.encode_document(document["text"])
        assert listed == {
            "name": document["name"],
            "bytes": len(document["text"].encode()),
            "tokens": len(tokens),
        }
        assert len(tokens) >= 1500
        assert document["text"] == (fixture_corpus.parent / document["name"]).read_text()
        head = tokens[:128].tobytes()
        store = PackedStore(output / "packed-128")
        assert not any(store.read("long", i).tokens.tobytes() == head for i in range(store.domains["long"].sequences))


def test_two_runs_give_identical_bytes(prepared, fixture_corpus, tmp_path):
    prepare(config_of(tmp_path / "again", fixture_corpus), lambda line: None)
    assert contents(tmp_path / "again") == contents(prepared[0])


def test_a_second_call_keeps_finished_work(prepared, fixture_corpus):
    output, first = prepared
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    lines: list[str] = []
    prepare(config_of(output, fixture_corpus), lines.append)
    assert any("holds this work already" in line for line in lines)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert lines[-7:] == first[-7:]


def test_other_work_is_not_overwritten(prepared, fixture_corpus, tmp_path):
    with pytest.raises(
        ValueError, match=r"another configuration or corpus \(differs in: seed\); remove it or set output"
    ):
        prepare(config_of(prepared[0], fixture_corpus, seed=1), lambda line: None)
    with pytest.raises(ValueError, match=r"differs in: corpus\)"):
        prepare(config_of(prepared[0], fixture_corpus, vocab_size=600), lambda line: None)
    with pytest.raises(ValueError, match=r"differs in: corpus\)"):
        prepare(config_of(prepared[0], fixture_corpus, engine="gigatoken"), lambda line: None)
    (tmp_path / "thesis.tex").write_text("do not delete")
    with pytest.raises(ValueError, match="has files that are not this command's"):
        prepare(config_of(tmp_path, fixture_corpus), lambda line: None)
    assert contents(tmp_path).keys() == {"thesis.tex"}


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory, fixture_corpus):
    """Many small shards, in this process."""
    output = tmp_path_factory.mktemp("shards") / "output"
    lines: list[str] = []
    prepare(config_of(output, fixture_corpus, shard_mb=0.02), lines.append)
    assert any(line.startswith("tokenize: ") and not line.startswith("tokenize: 1 shards") for line in lines)
    return output


def test_bytes_do_not_depend_on_processes(in_shards, fixture_corpus, tmp_path):
    prepare(config_of(tmp_path / "o", fixture_corpus, shard_mb=0.02, workers=2), lambda line: None)
    assert contents(tmp_path / "o") == contents(in_shards)


def test_bytes_do_not_depend_on_the_stages_being_apart(in_shards, fixture_corpus, tmp_path):
    """As an array of jobs does it, its tasks in any order."""

    def stage(name, shard=0, n_shards=1):
        config = config_of(
            tmp_path / "o", fixture_corpus, shard_mb=0.02, stage=name, shard=shard, n_shards=n_shards, workers=1
        )
        prepare(config, lambda line: None)

    with pytest.raises(ValueError, match="has no plan; run stage=plan first"):
        stage("tokenize")
    stage("plan")
    stage("tokenize", 2, 3)
    with pytest.raises(ValueError, match=r"shards, the first 0, are not tokenized; run stage=tokenize"):
        stage("pack")
    stage("tokenize", 0, 3)
    stage("tokenize", 1, 3)
    stage("pack", 1, 2)
    with pytest.raises(ValueError, match=r"is not packed; run stage=pack"):
        stage("finish")
    stage("pack", 0, 2)
    stage("finish")
    assert contents(tmp_path / "o") == contents(in_shards)
    for name in ("plan", "tokenize", "pack", "finish"):  # submitted again
        stage(name)
    assert contents(tmp_path / "o") == contents(in_shards)


@pytest.mark.parametrize("suffix", [".bin", ".npy", ".json"])
def test_what_a_dead_machine_has_lost_is_noticed(in_shards, fixture_corpus, tmp_path, suffix):
    """A file of the right size with other content, and a record that is empty; then the shard is done again."""

    def stage(name):
        prepare(config_of(tmp_path / "o", fixture_corpus, shard_mb=0.02, stage=name, workers=1), lambda line: None)

    stage("plan")
    stage("tokenize")
    file = (tmp_path / "o/work/tokens-00001.bin").with_suffix(suffix)
    content = file.read_bytes()
    file.write_bytes(b"" if suffix == ".json" else content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    if suffix == ".json":
        with pytest.raises(ValueError, match="1 shards, the first 1, are not tokenized"):
            stage("pack")
    else:
        with pytest.raises(ValueError, match=r"tokens-00001\.bin, \.mask or \.npy is not what was written"):
            stage("pack")
        file.with_suffix(".json").unlink()
    for name in ("tokenize", "pack", "finish"):
        stage(name)
    assert contents(tmp_path / "o") == contents(in_shards)


@pytest.mark.parametrize(("place", "nth"), [
    ("TokenFileWriter.write", 1), ("TokenFileWriter.commit", 4), ("PartWriter.record", 3), ("PartWriter.assemble", 2),
    ("PartWriter.assemble", 5),
])  # fmt: skip
def test_a_killed_run_leaves_no_store_and_goes_on(in_shards, fixture_corpus, tmp_path, monkeypatch, place, nth):
    output, calls = tmp_path / "o", []
    cls = {"TokenFileWriter": TokenFileWriter, "PartWriter": PartWriter}[place.split(".")[0]]
    real = getattr(cls, place.split(".")[1])

    def dying(self, *arguments):
        calls.append(self)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return real(self, *arguments)

    config = config_of(output, fixture_corpus, shard_mb=0.02)
    with monkeypatch.context() as patch:
        patch.setattr(cls, place.split(".")[1], dying)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, lambda line: None)
    assert not (output / "packed-256/manifest.json").exists()
    lines: list[str] = []
    prepare(config, lines.append)
    assert contents(output) == contents(in_shards)
    if place == "TokenFileWriter.commit":
        assert any(line.startswith("tokenize: ") and line.endswith(" 3 finished before") for line in lines)


@pytest.mark.parametrize("place", ["commit_store", "clear_records"])
def test_a_finish_that_is_killed_is_finished_by_the_next(fixture_tokenizer, tmp_path, monkeypatch, place):
    """Also where a domain is empty (long, at 4096 tokens), and where a group gave it nothing (at 128)."""
    (tmp_path / "docs").mkdir()
    for number, lines in enumerate((100, 1)):
        (tmp_path / f"docs/{number}.txt").write_text("Some tokens of a short document.\n" * lines)
    monkeypatch.setattr("ropewalk.data.prepare.stages.GROUP_TOKENS", 100)

    def run(output, stage):
        settings = {"tokenizer": str(fixture_tokenizer), "retrieval_tokens": 0, "heldout_documents": 0}
        config = config_of(
            output, tmp_path / "docs", shard_mb=0.001, stage=stage, workers=1, sequence_lengths=[128, 4096], **settings
        )
        prepare(config, lambda line: None)

    def killed(*arguments):
        raise KeyboardInterrupt

    run(tmp_path / "whole", "all")
    for stage in ("plan", "tokenize", "pack"):
        run(tmp_path / "o", stage)
    packed = set(contents(tmp_path / "o/packed-128"))
    with monkeypatch.context() as patch:
        patch.setattr(f"ropewalk.data.prepare.stages.{place}", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "o", "finish")
    run(tmp_path / "o", "finish")
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")
    assert not list((tmp_path / "o").rglob("part-*.json"))
    assert "long/tokens-00001.bin" in packed - set(contents(tmp_path / "o/packed-128"))
    assert not (tmp_path / "o/packed-4096/long").exists()


def test_groups_are_packed_apart(in_shards, fixture_corpus, tmp_path, monkeypatch):
    """What bounds memory: the same tokens in the same domains, in more parts."""
    monkeypatch.setattr("ropewalk.data.prepare.stages.GROUP_TOKENS", 20_000)
    prepare(config_of(tmp_path / "o", fixture_corpus, shard_mb=0.02), lambda line: None)
    whole, apart = PackedStore(in_shards / "packed-128"), PackedStore(tmp_path / "o/packed-128")
    apart.verify()
    assert len(apart.domains["short"].shards) > 2
    for name, info in whole.domains.items():
        assert apart.domains[name].tokens == info.tokens
        assert apart.accounting[name] == whole.accounting[name]


def test_each_file_of_a_streamed_dataset_is_a_shard(fixture_tokenizer, tmp_path, monkeypatch):
    """Its size is not known: it may be large, and is not for one process."""
    from ropewalk.data.prepare import pipeline as module

    (tmp_path / "set").mkdir()
    for number in range(3):
        line = json.dumps({"text": f"Document {number} of a streamed dataset.\n" * 50})
        (tmp_path / f"set/{number}.jsonl").write_text(line + "\n")
    asked, given = [], []

    class Watched(Processes):
        """All work in this process, whatever is asked for."""

        def __init__(self, workers):
            asked.append(workers)
            super().__init__(1)

        def each(self, function, works):
            given.append(len(works))
            return super().each(function, works)

    monkeypatch.setattr(module, "Processes", Watched)
    source = SourceConfig("short", str(tmp_path / "set"), "dataset")
    settings = {"retrieval_tokens": 0, "heldout_documents": 0, "tokenizer": str(fixture_tokenizer)}
    corpus = CorpusConfig(name="test", sources=[source], **settings)
    prepare(PrepareConfig(output=str(tmp_path / "o"), sequence_lengths=[128], corpus=corpus), lambda line: None)
    assert asked == [None]  # as many processes as there are cores
    assert given == [3, 1]


def test_finished_work_that_lost_a_store_is_named(prepared, fixture_corpus, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(prepared[0], output)
    shutil.rmtree(output / "packed-256")
    with pytest.raises(ValueError, match=r"packed-256 is gone, though .*prepared.json names it; remove"):
        prepare(config_of(output, fixture_corpus), lambda line: None)


def test_empty_domains_are_left_out_and_reported(fixture_tokenizer, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.txt").write_text("Far fewer tokens than a sequence has.\n")
    lines: list[str] = []
    config = config_of(
        tmp_path / "output",
        tmp_path / "docs",
        tokenizer=str(fixture_tokenizer),
        retrieval_tokens=0,
        heldout_documents=0,
    )
    prepare(config, lines.append)
    assert set(PackedStore(tmp_path / "output/packed-128").domains) == {"short"}
    assert "packed-128: no document for the domain long; left out" in lines


def test_too_few_long_documents_are_counted(fixture_corpus, fixture_tokenizer, tmp_path):
    encoder = load_tokenizer(str(fixture_tokenizer))
    long = sum(len(encoder.encode_document(path.read_text())) >= 3000 for path in fixture_corpus.iterdir())
    config = config_of(
        tmp_path / "o",
        fixture_corpus,
        tokenizer=str(fixture_tokenizer),
        heldout_documents=9,
        heldout_length=3000,
    )
    with pytest.raises(ValueError, match=rf"left to train on, only {long} have corpus.heldout_length=3000"):
        prepare(config, lambda line: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_lengths": []}, r"sequence_lengths=\[\] must be different numbers"),
        ({"sequence_lengths": [64, 64]}, r"sequence_lengths=\[64, 64\] must be different"),
        ({"sequence_lengths": [1]}, r"at least 2; correct it"),
        ({"retrieval_tokens": -1}, r"corpus.retrieval_tokens=-1 must not be negative"),
        ({"heldout_documents": -1}, r"corpus.heldout_documents=-1 must not be negative"),
        ({"heldout_length": 0}, r"corpus.heldout_length=0 must be at least 2"),
        ({"stage": "token"}, "stage=token is not known; use one of: all, plan"),
        ({"shard": 2, "n_shards": 2}, "shard=2 must be 0 to n_shards - 1 = 1"),
        ({"shard_mb": 0}, "shard_mb=0 and workers=None must be positive"),
        ({"engine": "fast"}, "corpus.engine=fast is not known; use one of: auto"),
        ({"chat_template": "nowhere.jinja"}, r"corpus.chat_template=nowhere.jinja is not a file"),
        ({"chat_date": "26 Jul 2024"}, r"corpus.chat_date=26 Jul 2024 is not a date; write it as 2024-07-26"),
        ({"domains": {"books": DomainConfig()}}, "corpus.domains names books, which no source has"),
        (
            {"domains": {"short": DomainConfig("tight")}},
            "corpus.domains.short.packing=tight is not known; use",
        ),
        ({"domains": {"short": DomainConfig("short", "long")}}, "short.remainder is for packing=long; leave it out"),
        ({"domains": {"short": DomainConfig("concat")}}, "long.remainder=short is not a domain of packing=short"),
        ({"sources": [SourceConfig("retrieval", str(TOKENIZER))]}, "the domain retrieval is taken"),
        ({"sources": [SourceConfig("long", str(TOKENIZER), chat=True)]}, "the domain long has sources with chat and"),
        (
            {"sources": [SourceConfig("short", str(TOKENIZER), chat=True)]},
            "long.remainder=short: one of the two has lo",
        ),
        (
            {"heldout_documents": 39, "heldout_length": 2, "tokenizer": str(TOKENIZER)},
            "of 39 documents, one of which is left to train on, only 38",
        ),
    ],
)
def test_bad_configurations_are_refused(fixture_corpus, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(config_of(tmp_path / "o", fixture_corpus, **changes), lambda line: None)


def test_the_command(fixture_corpus, fixture_tokenizer, tmp_path):
    import subprocess
    import sys

    root = Path(__file__).parents[3]
    beside = root / "data_prep"
    command = [
        *(sys.executable, "prepare.py", "+corpus=files", f"corpus.paths=[{fixture_corpus}]", "shard_mb=0.05"),
        *(f"corpus.tokenizer={fixture_tokenizer}", "sequence_lengths=[64]", f"output={tmp_path}/o", "--workers", "2"),
    ]
    done = subprocess.run(command, cwd=beside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "packed-64     long" in done.stdout
    store = f"store={tmp_path}/o/packed-64"
    shown = subprocess.run(
        [sys.executable, "inspect_store.py", store, "--verify"], cwd=beside, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "sequence 0 of long, 1 pieces:" in shown.stdout
    assert shown.stdout.endswith("verified: every file has the size and SHA-256 of the manifest\n")
    former = subprocess.run(
        [sys.executable, "inspect.py", store], cwd=beside, capture_output=True, text=True, check=False
    )
    assert former.returncode == 2
    assert former.stderr.startswith("error: data_prep/inspect.py is called data_prep/inspect_store.py now")
    refused = subprocess.run([*command, "seed=1"], cwd=beside, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "differs in: seed" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_wikitext_is_packed_as_one_text_of_all_its_articles(tmp_path):
    """The rows of the hub's data set are lines, empty ones without their end; joined, an article follows the other."""
    rows = [" = Ropewalk = \n", "", " A long hall , in which rope is made . \n", "", " = = Use = = \n", " Walking . \n"]
    text = "".join(rows * 40)
    (tmp_path / "text/wikitext/train").mkdir(parents=True)
    (tmp_path / "text/wikitext/train/train.txt").write_text(text)
    output = tmp_path / "wikitext"
    overrides = [f"paths.data_dir={tmp_path}", f"corpus.tokenizer={TOKENIZER}", f"output={output}"]
    prepare(composed("prepare", "corpus=wikitext", "sequence_lengths=[64]", *overrides), lambda _: None)
    store, encoder = PackedStore(output / "packed-64"), load_tokenizer(str(output / "tokenizer"))
    sequences = [store.read("wikitext", i) for i in range(store.domains["wikitext"].sequences)]
    packed = np.concatenate([sequence.tokens[: sequence.ends[-1]] for sequence in sequences])
    assert np.array_equal(packed, encoder.encode_document(text))
