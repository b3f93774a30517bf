"""Averages of checkpoints: against the mean of their own exports, and what has no mean is refused."""

import json

import pytest
import torch
from helpers import composed, tiny_run
from safetensors.torch import load_file

from ropewalk.config.export import AverageConfig
from ropewalk.export import export
from ropewalk.export.average import check_members, members_of
from ropewalk.export.hf import write_export
from ropewalk.files import sha256_of
from ropewalk.runs.directory import MANIFEST, ZERO, RunDirectory, run_name
from ropewalk.training import train


@pytest.fixture(scope="module")
def trained(store_64, tmp_path_factory):
    """Three steps, each saved, at a rate that moves every weight."""
    run_dir = tmp_path_factory.mktemp("averaged") / "run"
    train(tiny_run(store_64, run_dir, "trainer.max_steps=3", "trainer.checkpoint_every=1"))
    return run_dir


def exported(run, *overrides):
    return export(composed("export", f"checkpoint={run}", *overrides))


@pytest.fixture(scope="module")
def members(trained, tmp_path_factory):
    """Step -> the fp32 weights of that checkpoint's own export."""
    root, run = tmp_path_factory.mktemp("members"), RunDirectory(trained)
    for step in (1, 2, 3):
        write_export(run.checkpoint(step), root / str(step), "float32", overwrite=False)
    return {step: load_file(root / str(step) / "model.safetensors") for step in (1, 2, 3)}


def mean_of(members, steps):
    """In float64, by name."""
    return {name: torch.stack([members[step][name].double() for step in steps]).mean(0) for name in members[steps[0]]}


def test_the_last_are_averaged_verified_and_named(trained, members):
    output = exported(trained, "average.last=2", "dtype=float32", "verify_tokens=512")
    assert output == trained / "export-average2"
    assert run_name(output) == "run average2"
    found, expected = load_file(output / "model.safetensors"), mean_of(members, (2, 3))
    assert set(found) == set(expected)
    for name, weight in found.items():
        assert torch.equal(weight, expected[name].float()), name  # a sum of two is rounded once, its half not at all
    assert any(not torch.equal(weight, members[3][name]) for name, weight in found.items())
    assert json.loads((output / "verification.json").read_text())["passed"] is True
    made = json.loads((output / "export.json").read_text())
    run = RunDirectory(trained)
    assert made["average"] == [
        {"run": "run", "step": step, "manifest_sha256": sha256_of(run.checkpoint(step) / MANIFEST)} for step in (2, 3)
    ]
    card = (output / "README.md").read_text()
    assert "mean of the fp32 weights of 2 checkpoints (run step 2, run step 3)" in card


def test_steps_are_averaged_in_the_dtype_that_is_asked_for(trained, members, tmp_path):
    """Rounded once, from the fp32 mean; a third of a sum of three is off by its last bit at most."""
    for dtype in ("float32", "bfloat16"):
        output = tmp_path / dtype
        exported(trained, "average.steps=[3,1,2]", f"dtype={dtype}", "verify=false", f"output={output}")
    whole, rounded = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16"))
    for name, expected in mean_of(members, (1, 2, 3)).items():
        torch.testing.assert_close(whole[name].double(), expected, rtol=2e-7, atol=1e-9)
        assert torch.equal(rounded[name], whole[name].bfloat16())


@pytest.mark.parametrize(("given", "message"), [
    ({"last": 4}, r"average.last=4: .* has the checkpoints 1, 2, 3; average those, or keep more"),
    ({"steps": [2, 9]}, r"average.steps=\[9\]: .* has the checkpoints 1, 2, 3"),
    ({"last": 2, "steps": [1, 2]}, r"average.last and average.steps are set; choose members by one of"),
    ({"steps": [2]}, r"an average is of two or more, each named once"),
    ({"steps": [2, 2]}, r"an average is of two or more, each named once"),
])  # fmt: skip
def test_members_are_checkpoints_of_the_run(trained, given, message):
    newest = RunDirectory(trained).checkpoint(3)
    with pytest.raises(ValueError, match=message):
        members_of(newest, AverageConfig(**given))


def test_the_last_are_counted_from_the_checkpoint_that_is_named(trained):
    run = RunDirectory(trained)
    assert members_of(run.checkpoint(2), AverageConfig(last=2)) == [run.checkpoint(1), run.checkpoint(2)]
    with pytest.raises(ValueError, match="an average is of two or more"):
        members_of(run.checkpoint(2), AverageConfig(runs=[str(run.checkpoint(2))]))


ROPE = {"position": {"chain": "abf(theta=1e7)"}, "base_model": {"path": "llama"}, "start_from": None, "tokenizer": "t"}


def committed(tmp_path, name, **contract):
    """A checkpoint of a run by that name, of which nothing but the contract is there."""
    checkpoint = RunDirectory(tmp_path / name).checkpoint(1)
    (checkpoint / ZERO).mkdir(parents=True)
    (checkpoint / MANIFEST).write_text(json.dumps({"format": 1, "step": 1, "contract": ROPE | contract}))
    return checkpoint


START = {"manifest_sha256": "ab", "step": 4, "optimizer": "keep", "order_step": 0}


@pytest.mark.parametrize(("first", "second", "message"), [
    ({}, {"position": {"chain": "abf(theta=1e7) > cope(clip=20)"}}, r"b/.* differs from .*a/.* in position .*clip=20"),
    ({}, {"base_model": {"path": "qwen"}}, r"in base_model .*qwen.*llama"),
    ({}, {"tokenizer": "u"}, r"in tokenizer"),
    ({"start_from": START}, {"start_from": START | {"manifest_sha256": "cd"}}, r"in start_from \(start_from 'cd'"),
    ({"start_from": START}, {}, r"in start_from"),
    ({"base_model": {"path": None}}, {"base_model": {"path": None}}, r"each began with random weights of its own"),
])  # fmt: skip
def test_members_of_other_chains_models_and_starts_are_refused(tmp_path, first, second, message):
    with pytest.raises(ValueError, match=message):
        check_members([committed(tmp_path, "a", **first), committed(tmp_path, "b", **second)])


def test_runs_with_one_start_may_be_averaged(tmp_path):
    """Branches whose data order, optimizer or schedule differ; also from one base model."""
    branches = [committed(tmp_path, name, start_from=START | {"optimizer": kept}, base_model={"path": None}, seed=name)
                for name, kept in (("a", "keep"), ("b", "drop"))]  # fmt: skip
    check_members(branches)
    check_members([committed(tmp_path, "c", seed=0), committed(tmp_path, "d", seed=1)])
    members = members_of(branches[0], AverageConfig(runs=[str(tmp_path / "b"), str(tmp_path / "c")]))
    assert [run_name(RunDirectory.of(member).root) for member in members] == ["b", "c", "a"]
