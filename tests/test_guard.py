"""The guard of a live model: the silent faults that people report, in transformers' own classes and trainers."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import alone_environment, save_tiny, torchrun
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ropewalk.guard import main, rotation_faults
from ropewalk.model.rotary import place_position
from ropewalk.rope import Position, RopeChain
from ropewalk.rope.position import METADATA_KEY

TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 4096,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)  # a training before it in this process


def llama(**fields):
    return LlamaForCausalLM(LlamaConfig(**TINY, **fields))


def cope(trained_length=4096):
    return Position("cope", RopeChain.parse("abf(theta=1e6) > cope(clip=4)"), 1e4, 32, 4096, trained_length)


@pytest.mark.parametrize("entry", [
    None, LINEAR, {"rope_type": "dynamic", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 1024},
], ids=str)  # fmt: skip
def test_a_model_that_rotates_by_its_config_has_no_fault(entry):
    model = llama(rope_parameters=entry and {"rope_theta": 1e4, **entry})
    assert rotation_faults(model) == []
    assert rotation_faults(model, length=16384) == []
    assert entry is None or rotation_faults(model, entry) == []


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "glm", "phi3", "olmo2", "mistral"])
def test_other_classes_have_none_either(tmp_path, model_type):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path, model_type, pad_token_id=0, eos_token_id=0))
    assert rotation_faults(model) == []
    assert rotation_faults(model, tmp_path) == []


def test_an_export_of_ours_is_held_against_its_metadata():
    config = LlamaConfig(**TINY)
    place_position(config, cope())
    setattr(config, METADATA_KEY, cope().metadata())
    model = LlamaForCausalLM(config)
    assert rotation_faults(model) == []
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 5e5}
    (fault,) = rotation_faults(LlamaForCausalLM(config))
    assert "rotates other than the claimed chain" in fault
    assert "cope(clip=4)" in fault


def test_keys_that_transformers_does_not_read_are_named():
    """Each builds a model of plain RoPE without a word, or with one line of a log."""
    config = LlamaConfig(**TINY)
    config.rope_theta = 1e6
    assert [
        "rope_theta=1000000.0 in the config is read by nothing" in f for f in rotation_faults(LlamaForCausalLM(config))
    ] == [True]
    faults = rotation_faults(llama(rope_scaling_type="linear", rope_scaling_factor=4.0))
    assert [fault.split(" in the config")[0] for fault in faults] == [
        "rope_scaling_type='linear'",
        "rope_scaling_factor=4.0",
    ]
    (fault,) = rotation_faults(llama(rope_scaling={"factor": 4.0}))
    assert "Unrecognized keys" in fault
    assert "'factor'" in fault
    (fault,) = rotation_faults(llama(use_cope=True))
    assert fault.startswith("use_cope=True")


def test_a_scaling_that_was_asked_for_and_is_not_there():
    model = llama()
    (fault,) = rotation_faults(model, LINEAR)
    assert "at pairs [0, 1, 2" in fault
    assert "pi(factor=4" in fault
    assert "rotates other" in rotation_faults(model, cope())[0]


def test_a_config_that_changed_after_the_model_was_built():
    model = llama()
    model.config.rope_parameters = dict(LINEAR)
    (fault,) = rotation_faults(model)
    assert "rotates with 16 pairs from 1 to" in fault
    assert "(linear) with 16 pairs from 0.25 to" in fault


def test_a_patch_of_the_class_that_loading_undoes(tmp_path, monkeypatch):
    directory = save_tiny(tmp_path)
    original = LlamaRotaryEmbedding.__init__

    def slower(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        self.inv_freq.mul_(0.25)

    monkeypatch.setattr(LlamaRotaryEmbedding, "__init__", slower)
    (fault,) = rotation_faults(AutoModelForCausalLM.from_pretrained(directory))
    assert "a patch of the class was undone" in fault


def test_a_forward_that_is_patched(monkeypatch):
    original = LlamaRotaryEmbedding.forward
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", lambda self, x, ids: original(self, x, ids / 4))
    (fault,) = rotation_faults(llama())
    assert "cos and sin at position 4,095 are not those of its frequencies" in fault


def test_a_cast_is_named_with_its_error():
    """bfloat16 keeps 8 bits, so a frequency is off by up to 2^-9, relative to the rounded one."""
    faults = rotation_faults(llama().to(torch.bfloat16))
    share = float(faults[0].split("off by up to ")[1].split("%")[0])
    assert 0.5 * 100 * 2**-9 < share <= 100 * 2**-8
    assert "bfloat16, not float32" in faults[0]


def test_a_buffer_that_was_written_to():
    model = llama(rope_parameters={**LINEAR, "rope_type": "yarn"})
    model.model.rotary_emb.attention_scaling *= 2
    (fault,) = rotation_faults(model)
    by_paper = 0.1 * math.log(4.0) + 1
    assert f"attention scaling {2 * by_paper:g}, by its config {by_paper:g}" in fault
    assert "rotates" not in fault


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_trainers_of_others_stop(tmp_path, trainer):
    """In a process of its own: accelerate joins whatever process group a test before it has left."""
    pytest.importorskip(trainer, reason="TRL is not installed; it was run as docs/status.md says")
    environment = {**alone_environment(), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "tests/guard_trainers.py", trainer, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_ranks_that_differ_all_stop():
    torchrun(2, "tests/guard_ranks.py")


def test_it_loads_numpy_torch_and_transformers_alone():
    code = (
        "import sys, numpy, torch\n"
        "from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, TrainerCallback\n"
        "before = set(sys.modules)\n"
        "import ropewalk.guard\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ropewalk"]


def test_the_command_reads_a_directory(tmp_path, capsys):
    directory = save_tiny(tmp_path / "model")
    assert main([str(directory)]) == 0
    said = capsys.readouterr().out
    assert "\nmodel.rotary_emb: default, " in f"\n{said}"  # where DeepSpeed is installed, it may say something first
    assert "fault: " not in said
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, "rope_scaling_type": "yarn"}))
    assert main([str(directory)]) == 1
    assert "fault: rope_scaling_type='yarn' in the config is read by nothing" in capsys.readouterr().out
    wanted = AutoConfig.from_pretrained(directory)
    wanted.rope_parameters = {**wanted.rope_parameters, "rope_theta": 5e5}
    wanted.save_pretrained(tmp_path / "wanted")
    assert main([str(directory), "--expected", str(tmp_path / "wanted")]) == 1
    assert "rotates other than the claimed chain" in capsys.readouterr().out
    assert main([str(tmp_path / "absent")]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_command_runs_no_code_and_does_not_ask(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    content = {"model_type": "internlm2", "auto_map": {"AutoConfig": "configuration_x.X"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "configuration_x.py").write_text("raise SystemExit('it ran')")
    assert main([str(tmp_path)]) == 2
    assert "its own code (auto_map) is never run" in capsys.readouterr().err
