from __future__ import annotations

import json
import math
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoConfig, LlamaForCausalLM

from ropewalk.cli import register_schemas, to_object
from ropewalk.config import CONFIG_DIR
from ropewalk.config.evaluation import EvaluateConfig, KeyTokensConfig
from ropewalk.config.groups import AnswersConfig, NeedleConfig, RopeConfig
from ropewalk.config.groups import TestTimeConfig as AtTestTime
from ropewalk.evaluation import evaluate, not_finite, read_document_losses, read_record, read_results
from ropewalk.evaluation.documents import make_windows
from ropewalk.evaluation.harness.answer_recovery import FULL, NONE, ORACLE, build_answers
from ropewalk.evaluation.harness.key_tokens import write_key_tokens
from ropewalk.model.load import load_for_evaluation

YARN = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": "trained_length"}


@pytest.fixture
def config(config) -> EvaluateConfig:
    config.lengths, config.needle.samples = [128, 256, 512], 0
    config.test_time = AtTestTime(name="auto", beyond=[YARN])
    return config


def stock_loss(checkpoint: Path, ids: torch.Tensor, start: int, rope_parameters: dict[str, Any]) -> float:
    """Mean NLL of positions from ``start`` on, by transformers alone."""
    config = AutoConfig.from_pretrained(checkpoint)
    config.rope_parameters = rope_parameters
    model = LlamaForCausalLM.from_pretrained(checkpoint, config=config).eval()
    labels = ids.clone()
    labels[:, :start] = -100
    with torch.no_grad():
        return float(model(ids, labels=labels).loss)


def test_losses_are_those_of_stock_transformers(config, checkpoint, documents, tokenizer, capsys) -> None:
    results = evaluate(config)
    windows = torch.stack(list(make_windows(documents, tokenizer, 512).tokens.values()))
    default = {"rope_type": "default", "rope_theta": 1e4}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
    expected = {
        128: stock_loss(checkpoint, windows[:, :128], 64, default),
        256: stock_loss(checkpoint, windows[:, :256], 128, default),
        512: stock_loss(checkpoint, windows, 256, yarn),
    }
    at_length = results[results["task"] == "loss_at_length"].set_index("context_length")["value"]
    assert at_length.to_dict() == pytest.approx(expected, abs=2e-5)
    assert stock_loss(checkpoint, windows, 256, default) != pytest.approx(expected[512], abs=1e-2)
    printed = capsys.readouterr().out
    assert "left out: 1 shorter, 0 beyond max_documents" in printed
    assert "100%  ETA 0:00:00" in printed


def test_what_is_written_says_how_it_was_made(config, tmp_path) -> None:
    evaluate(config)
    results, record = read_results(tmp_path / "evaluation"), read_record(tmp_path / "evaluation")
    assert set(results["run"]) == {"tiny"}  # of .../tiny/export
    assert set(results["method"]) == {"pretrained"}
    beyond = results[results["context_length"] == 512]
    assert set(beyond["chain"]) == {"yarn(factor=4, original_max_position_embeddings=256)"}
    assert record["trained_length"] == 256
    assert [setting["lengths"] for setting in record["settings"]] == [[128, 256], [512]]
    np.testing.assert_allclose(record["settings"][0]["inv_freq"], 1e4 ** (-np.arange(8) / 8), rtol=1e-12)
    assert record["settings"][1]["attention_scaling"] == pytest.approx(0.1 * math.log(4) + 1)
    assert record["config"]["lengths"] == [128, 256, 512]
    assert record["documents"]["too_short"] == 1
    sums = read_document_losses(tmp_path / "evaluation")
    assert sums.groupby("setting")["document"].nunique().to_dict() == dict.fromkeys(set(sums["setting"]), 3)
    assert sums.groupby("setting")["tokens"].sum().sort_values().tolist() == [3 * 255, 3 * 511]


def test_a_model_that_knows_nothing_scores_the_log_of_its_vocabulary(config, checkpoint, tmp_path) -> None:
    blind = tmp_path / "blind"
    shutil.copytree(checkpoint, blind)
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(blind)
    config.checkpoint, config.name, config.lengths = str(blind), "named", [256, 512]
    config.needle.samples = 2
    results = evaluate(config)
    assert set(results["run"]) == {"named"}
    nll = results[results["metric"].isin(["nll", "answer_nll", "answer_nll_shuffled"])]
    for column in ("value", "ci_low", "ci_high"):
        assert nll[column].to_numpy() == pytest.approx(np.full(len(nll), math.log(258)), rel=1e-6)
    cells = results[results["task"] == "needle"]
    assert sorted(set(zip(cells["context_length"], cells["depth"], strict=True))) == [
        (256, 0.0),
        (256, 1.0),
        (512, 0.0),
        (512, 1.0),
    ]
    assert set(cells["n"]) == {2}


def test_the_rope_group_is_applied_without_training(config) -> None:
    config.lengths, config.test_time = [128], AtTestTime(name="none")
    plain = evaluate(config)
    config.rope = RopeConfig("hardclip4", [{"method": "hardclip", "clip": 4}])
    with pytest.raises(ValueError, match=r"with chain=rope, not hardclip\(clip=4\); spectrum=.*; name another output"):
        evaluate(config)
    config.overwrite = True
    clipped = evaluate(config)
    assert set(clipped["method"]) == {"hardclip4"}
    assert set(clipped["chain"]) == {"hardclip(clip=4)"}
    assert abs(plain["value"].iloc[-1] - clipped["value"].iloc[-1]) > 1e-4


def test_a_finished_evaluation_is_kept(config, monkeypatch, capsys) -> None:
    config.lengths = [128]
    made = evaluate(config)
    monkeypatch.setattr("ropewalk.evaluation.evaluated_checkpoint.load_for_evaluation", None)  # must not be needed
    again = evaluate(config)
    assert "holds this evaluation already" in capsys.readouterr().out
    assert again["value"].tolist() == made["value"].tolist()


def test_one_model_is_in_memory_at_a_time(config, monkeypatch) -> None:
    loaded: list[weakref.ref] = []

    def load(*arguments, **options):
        assert not any(reference() for reference in loaded)
        model = load_for_evaluation(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("ropewalk.evaluation.evaluated_checkpoint.load_for_evaluation", load)
    evaluate(config)
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [32, 128]}, r"lengths=\[32, 128\] must name contexts of 64 tokens or more"),
        ({"lengths": []}, r"lengths=\[\] must name"),
        ({"lengths": [256, 128, 128]}, r"must ascend without repeats; write \[128, 256\]"),
        ({"lengths": [128, 99_999]}, "lengths=99999 is longer than every document"),
        ({"max_documents": 0}, "max_documents=0 must be 1 or more"),
        ({"documents": "nowhere"}, "documents=nowhere is not a directory"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"dtype": "float16"}, "dtype=float16 is not known"),
        ({"device": "tpu"}, "device=tpu is not known"),
        ({"needle": NeedleConfig(depths=[0.5, 1.5])}, r"needle.depths=\[0.5, 1.5\] must be shares"),
        ({"needle": NeedleConfig(depths=[0.5, 0.5])}, r"needle.depths=\[0.5, 0.5\] must differ"),
        ({"needle": NeedleConfig(depths=[0.5], samples=1)}, "needs at least two prompts"),
        ({"needle": NeedleConfig(digits=1, distractors=9)}, "needle.distractors=9"),
        ({"needle": NeedleConfig(), "lengths": [64, 128]}, "lengths=64 leaves no room for a haystack"),
    ],
)
def test_mistakes_end_before_a_model_is_loaded(config, monkeypatch, changes: dict, message: str) -> None:
    monkeypatch.setattr("ropewalk.evaluation.evaluated_checkpoint.load_for_evaluation", None)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        evaluate(config)


def test_cuda_without_a_device_is_refused(config, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config.device = "cuda"
    with pytest.raises(ValueError, match="device=cuda, but torch"):
        evaluate(config)


def test_a_tokenizer_larger_than_the_model_is_refused(config, checkpoint, tmp_path) -> None:
    small = tmp_path / "small"
    shutil.copytree(checkpoint, small)
    fields = json.loads((small / "config.json").read_text()) | {"vocab_size": 200}
    (small / "config.json").write_text(json.dumps(fields))
    config.checkpoint = str(small)
    with pytest.raises(ValueError, match="has 258 tokens, but the model embeds 200"):
        evaluate(config)


def test_a_checkpoint_without_tokenizer_is_refused(config, checkpoint, tmp_path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, bare / name)
    config.checkpoint = str(bare)
    with pytest.raises(ValueError, match="has no tokenizer that transformers reads"):
        evaluate(config)


def test_an_incomplete_checkpoint_is_refused(config, checkpoint, tmp_path) -> None:
    half = tmp_path / "half"
    shutil.copytree(checkpoint, half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config.checkpoint = str(half)
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read .*incomplete metadata.*; copy it anew"):
        evaluate(config)
    shards = {"a": "model-00001.safetensors", "b": "model-00002.safetensors", "c": "model-00003.safetensors"}
    (half / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    weights.rename(half / "model-00001.safetensors")
    with pytest.raises(ValueError, match=r"names model-00002.safetensors, model-00003.safetensors, not there"):
        evaluate(config)
    (half / "model.safetensors.index.json").write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(ValueError, match=r"index.json is not an index of weights .*copy it anew"):
        evaluate(config)


def test_a_foreign_directory_is_refused(config, tmp_path) -> None:
    config.checkpoint = str(tmp_path)
    with pytest.raises(ValueError, match="neither a run directory with a committed checkpoint, nor a checkpoint, nor"):
        evaluate(config)


def test_the_shipped_configuration_composes() -> None:
    register_schemas()
    overrides = [
        "checkpoint=c",
        "documents=d",
        "output=o",
        "lengths=[512,1024]",
        "device=cpu",
        "dtype=float32",
    ]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = to_object(compose("evaluate", overrides))
    assert isinstance(composed, EvaluateConfig)
    assert composed.lengths == [512, 1024]
    assert composed.test_time.beyond[0]["original_max_position_embeddings"] == "trained_length"


def test_numbers_that_are_none_are_written_and_named(config, checkpoint, tmp_path, capsys) -> None:
    """One NaN in the head's row of a token makes every probability NaN: no loss, and no needle that was not found."""
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    model.lm_head.weight.data[5] = math.nan
    model.save_pretrained(broken)
    config.checkpoint, config.lengths, config.needle.samples = str(broken), [128, 256], 2
    table = evaluate(config)
    assert table["value"].isna().all()
    assert set(table[table["metric"] == "exact_match"]["n"]) == {2, 4}  # prompts of a cell, and of all depths
    assert "losses of 3 of 3 documents, read to 256 tokens under none" in not_finite(config.output)
    assert "ropewalk needle_at_length (exact_match) at 128, 256 tokens" in not_finite(config.output)
    printed = capsys.readouterr().out
    assert re.search(r"^256 +none +NaN +NaN", printed, re.MULTILINE)
    assert "warning: not a finite number: losses of 3 of 3 documents" in printed
    assert (Path(config.output) / "not_finite.txt").read_text().splitlines() == not_finite(config.output)
    config.checkpoint, config.output = str(checkpoint), str(tmp_path / "sound")
    evaluate(config)
    assert not_finite(config.output) == []
    assert (Path(config.output) / "not_finite.txt").read_text() == ""


def test_answers_are_graded_as_stock_transformers_would(config, checkpoint, documents, tokenizer, capsys) -> None:
    config.lengths, config.answers = [512, 1024], AnswersConfig(count=5, per_sequence=2, values=2)
    config.test_time = AtTestTime(name="none")
    results = evaluate(config)
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    windows = make_windows(documents, tokenizer, 1024)
    for context, metric in ((FULL, "answer_nll"), (ORACLE, "answer_nll_oracle"), (NONE, "answer_nll_none")):
        for length in (512, 1024):
            nll = tokens = 0
            for row in build_answers(tokenizer, windows, length, config.answers, config.needle, 0, 512):
                if row.context != context:
                    continue
                with torch.no_grad():
                    logits = model(row.ids[None]).logits[0].log_softmax(-1)
                for start, answer in zip(row.starts, row.answers, strict=True):
                    nll -= sum(float(logits[start - 1 + i, token]) for i, token in enumerate(answer.tolist()))
                    tokens += len(answer)
            found = results[(results["task"] == "answers") & (results["metric"] == metric)]
            assert found.set_index("context_length")["value"][length] == pytest.approx(nll / tokens, rel=1e-5)
    of_order = results[results["task"] == "order"]
    shares = of_order[of_order["metric"].str.startswith("answers_")].groupby("context_length")["value"].sum()
    assert shares.to_dict() == pytest.approx({512: 100.0, 1024: 100.0})
    assert (results.loc[results["task"].isin(["answers", "order"]) & (results["value"].notna()), "n"] >= 5).all()
    samples = (Path(config.output) / "cells/ropewalk/answers/512.none.samples.jsonl").read_text().splitlines()
    assert set(json.loads(samples[0])) >= {"sequence", "number", "nll", "nll_oracle", "nll_none", "exact", "tokens"}
    printed = capsys.readouterr().out
    assert "answers n" in printed  # beside its numbers
    assert "order answers_first" in printed
    evaluate(config)
    assert "holds this evaluation already" in capsys.readouterr().out


def test_key_tokens_are_chosen_once_and_scored_in_every_evaluation(config, checkpoint, documents, tokenizer) -> None:
    config.lengths, config.test_time = [256, 512], AtTestTime(name="none")
    chosen = KeyTokensConfig(
        checkpoint=str(checkpoint), documents=str(documents), length=512, short=64, device="cpu", dtype="float32"
    )
    path = write_key_tokens(chosen)
    with pytest.raises(ValueError, match="is there already, and numbers over other tokens do not compare"):
        write_key_tokens(chosen)
    content = json.loads(path.read_text())
    assert content["reference"]["chain"] == "rope"
    assert len(content["reference"]["sha256"]) == 64
    assert set(content["documents"]) == {"doc-0", "doc-1", "doc-2"}
    for entry in content["documents"].values():  # a random model hardly chooses any
        entry["positions"] = list(range(200, 300))
    path.write_text(json.dumps(content))
    results = evaluate(config)
    found = results[results["task"] == "longppl"].set_index("context_length")
    assert found["metric"].to_dict() == {256: "too_few_key_tokens", 512: "nll"}
    assert found["n"].to_dict() == {256: 0, 512: 300}
    windows = torch.stack(list(make_windows(documents, tokenizer, 512).tokens.values()))
    labels = windows.clone()
    labels[:, :200] = labels[:, 300:] = -100
    with torch.no_grad():
        expected = float(LlamaForCausalLM.from_pretrained(checkpoint).eval()(windows, labels=labels).loss)
    assert found["value"][512] == pytest.approx(expected, abs=2e-5)
