import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import documents_of
from transformers import AutoTokenizer

from ropewalk.config.data import CorpusConfig, SourceConfig
from ropewalk.data.prepare.corpus import Document
from ropewalk.data.prepare.tokenizer import BOS, EOS, DocumentEncoder, load_tokenizer, train_tokenizer
from ropewalk.data.store.tokenizer_files import describe_tokenizer, is_plain
from ropewalk.files import copy_files


@pytest.fixture(scope="module")
def encoder(fixture_tokenizer):
    return load_tokenizer(str(fixture_tokenizer))


def test_training_again_gives_the_committed_tokenizer(fixture_corpus, fixture_tokenizer, tmp_path):
    from ropewalk.data.prepare.prepare_plan import _make_encoder

    documents, _ = documents_of(CorpusConfig(paths=[str(fixture_corpus)]))
    for name in ("1", "2"):
        _make_encoder(CorpusConfig(name="fixture", vocab_size=512), 0, documents, ()).save(tmp_path / name)
    committed = json.loads((fixture_tokenizer / "tokenizer.json").read_text())["model"]
    for name in ("1", "2"):
        model = json.loads((tmp_path / name / "tokenizer.json").read_text())["model"]
        assert (model["vocab"], model["merges"]) == (committed["vocab"], committed["merges"])


def test_stock_transformers_loads_it(fixture_tokenizer):
    """In a process that knows nothing of this package; BOS in front, every digit alone, decoding is exact."""
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        f"t = AutoTokenizer.from_pretrained({str(fixture_tokenizer)!r})\n"
        "text = 'Tab\\tand 48213 naïve ☃\\n'\n"
        "ids = t(text).input_ids\n"
        "assert ids[0] == t.bos_token_id == 0 and t.eos_token_id == 1, ids\n"
        "assert t.decode(ids[1:], clean_up_tokenization_spaces=False) == text, t.decode(ids)\n"
        "assert [t.decode([i]) for i in ids if t.decode([i]).strip().isdigit()] == list('48213')\n"
        "assert 'ropewalk' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_documents_are_wrapped(encoder):
    text = "What a hack.\n"
    (ids,) = encoder.encode_texts([text])
    assert encoder.encode_document(text).tolist() == [0, *ids, 1]
    assert encoder.encode_document(text).dtype == np.uint32


def test_text_that_looks_like_a_special_token_is_text(encoder):
    ids = encoder.encode_document(f"a {EOS} b {BOS}")
    assert np.count_nonzero(ids == 1) == 1
    assert np.count_nonzero(ids == 0) == 1


def test_parts_are_joined_where_no_token_crosses(encoder, tmp_path):
    """Encoding a package file by file gives the tokens of the whole text."""
    for name, text in {"a.py": "x = 1\n\n\n", "b.py": "    y", "c.py": ""}.items():
        (tmp_path / "pkg").mkdir(exist_ok=True)
        (tmp_path / "pkg" / name).write_text(text)
    (document,), _ = documents_of(CorpusConfig(sources=[SourceConfig("code", str(tmp_path), "repositories")]))
    assert len(document.parts) == 3
    (tokens,) = encoder.encode_documents([document.parts])
    np.testing.assert_array_equal(tokens, encoder.encode_document(document.text))


def test_batches_keep_documents_apart(encoder, monkeypatch):
    import ropewalk.data.prepare.tokenizer as module

    documents = [Document("a", ("one two", " three")), Document("b", ("x" * 50,)), Document("c", ("end",))]
    expected = [
        [0, *(token for ids in encoder.encode_texts(list(document.parts)) for token in ids), 1]
        for document in documents
    ]
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 10)
    assert [t.tolist() for t in encoder.encode_documents([d.parts for d in documents])] == expected


def test_describe(fixture_tokenizer, tmp_path):
    described = describe_tokenizer(fixture_tokenizer)
    assert (described["vocab_size"], described["bos_id"], described["eos_id"]) == (512, 0, 1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((fixture_tokenizer / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["bos_token"], config["eos_token"] = None, {"content": EOS, "lstrip": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    other = describe_tokenizer(tmp_path)
    assert (other["bos_id"], other["eos_id"]) == (None, 1)
    assert other["sha256"] != described["sha256"]


def test_a_plain_tokenizer_is_one_that_transformers_adds_nothing_to(fixture_tokenizer, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((fixture_tokenizer / name).read_bytes())
    assert is_plain(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for change, plain in (
        ({"added_tokens_decoder": {"1": {"content": EOS}}}, True),
        ({"added_tokens_decoder": {"512": {"content": "<|pad|>"}}}, False),
        ({"tokenizer_class": "LlamaTokenizer"}, False),
        ({"bos_token": None}, True),
        ({"eos_token": "</s>"}, False),  # without it documents would not end
        ({"bos_token": {"__type": "AddedToken"}}, False),
        ({"added_tokens_decoder": {"1": {"special": True}}}, False),
        ({"added_tokens_decoder": [EOS]}, False),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **change}))
        assert is_plain(tmp_path) == plain
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert not is_plain(tmp_path)
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert not is_plain(tmp_path)
    assert not is_plain(tmp_path / "elsewhere")


@pytest.mark.parametrize("decoder", [{}, {"added_tokens_decoder": {"1": {"content": EOS, "special": True}}}])
def test_documents_end_as_transformers_has_it_where_two_files_name_eos(fixture_tokenizer, tmp_path, decoder):
    copy_files(fixture_tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **decoder}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": BOS}}))
    stock = AutoTokenizer.from_pretrained(tmp_path).eos_token_id
    assert load_tokenizer(tmp_path, saved=True).tail.tolist() == [stock]
    assert describe_tokenizer(tmp_path)["eos_id"] == stock


def test_vocabularies_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"corpus.vocab_size=257 must be at least 258"):
        train_tokenizer(["text"], 257)
    with pytest.raises(ValueError, match=r"fewer than corpus.vocab_size=5000; lower it or add text"):
        train_tokenizer(["a few words, a few merges"], 5000)


def test_tokenizers_without_bos_end_their_documents_with_eos(fixture_tokenizer):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(fixture_tokenizer))
    tokenizer.bos_token = None
    (ids,) = DocumentEncoder(tokenizer).encode_texts(["a hack"])
    assert DocumentEncoder(tokenizer).encode_document("a hack").tolist() == [*ids, 1]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has neither a BOS nor an EOS token to separate documents"):
        DocumentEncoder(tokenizer)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"corpus.tokenizer=.*missing cannot be opened"):
        load_tokenizer(str(tmp_path / "missing"))
