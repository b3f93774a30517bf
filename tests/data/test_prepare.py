import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ropewalk.data.prepare as module
from ropewalk.config import CorpusConfig, PrepareConfig
from ropewalk.data import PackedStore
from ropewalk.data.corpus import load_corpus
from ropewalk.data.prepare import prepare
from ropewalk.data.tokenizer import load_tokenizer

TOKENIZER = Path(__file__).parents[1] / "fixtures/tokenizer"


def config_of(output: Path, corpus: Path, **changes) -> PrepareConfig:
    settings = {"vocab_size": 512, "retrieval_tokens": 3000, "heldout_documents": 2, "heldout_length": 1500}
    lengths = changes.pop("sequence_lengths", [128, 256])
    seed = changes.pop("seed", 0)
    return PrepareConfig(
        output=str(output),
        sequence_lengths=lengths,
        seed=seed,
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
    training = [d for d in load_corpus(False, [str(fixture_corpus)]).documents if d.name not in held]
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
    (tmp_path / "thesis.tex").write_text("do not delete")
    with pytest.raises(ValueError, match="has files that are not this command's"):
        prepare(config_of(tmp_path, fixture_corpus), lambda line: None)
    assert contents(tmp_path).keys() == {"thesis.tex"}


def test_a_killed_run_leaves_no_store_and_is_done_again(prepared, fixture_corpus, tmp_path, monkeypatch):
    output, real, calls = tmp_path / "output", module.write_store, []

    def dying(root, *rest):
        calls.append(root)
        if len(calls) == 2:
            sequences = rest[1]["long"]

            def killed():
                yield next(iter(sequences))
                raise KeyboardInterrupt

            rest = (rest[0], {**rest[1], "long": killed()}, *rest[2:])
        return real(root, *rest)

    monkeypatch.setattr(module, "write_store", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(config_of(output, fixture_corpus), lambda line: None)
    assert (output / "packed-256/long").is_dir()
    assert not (output / "packed-256/manifest.json").exists()
    monkeypatch.setattr(module, "write_store", real)
    prepare(config_of(output, fixture_corpus), lambda line: None)
    assert contents(output) == contents(prepared[0])


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
    with pytest.raises(ValueError, match=rf"set aside only {long} have corpus.heldout_length=3000"):
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
        (
            {"heldout_documents": 39, "heldout_length": 2, "tokenizer": str(TOKENIZER)},
            "of the 38 documents that could be set aside only 38",
        ),
    ],
)
def test_bad_configurations_are_refused(fixture_corpus, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(config_of(tmp_path / "o", fixture_corpus, **changes), lambda line: None)


def test_the_command(fixture_corpus, fixture_tokenizer, tmp_path):
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    command = [
        *(
            sys.executable,
            str(root / "data_prep/prepare.py"),
            "corpus=files",
            f"corpus.paths=[{fixture_corpus}]",
        ),
        *(f"corpus.tokenizer={fixture_tokenizer}", "sequence_lengths=[64]", f"output={tmp_path}/o"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "packed-64     long" in done.stdout
    refused = subprocess.run([*command, "seed=1"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "differs in: seed" in refused.stderr
    assert refused.stderr.count("\n") == 1
