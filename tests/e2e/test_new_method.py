"""A method of one's own: one function in one file and one YAML, and every command has it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import run_commands
from helpers import alone_environment

from ropewalk.config import CONFIG_DIR

ROOT = CONFIG_DIR.parent


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page of documentation, in order."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def copied(root: Path, function: str, **files: str) -> dict[str, str]:
    """The repository with one more module of methods, and YAML files by ``group__name``; an environment to run it."""
    for folder in ("src", "configs", "scripts"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    shutil.copy(ROOT / "train.py", root)
    (root / "src/ropewalk/rope/methods/own.py").write_text(function)
    for place, content in files.items():
        (root / "configs" / f"{place.replace('__', '/')}.yaml").write_text(content)
    return {**alone_environment(), "PYTHONPATH": str(root / "src")}


def test_the_guides_example_runs_as_it_stands(tmp_path):
    (function,), (chain, experiment, *_) = blocks("CONTRIBUTING.md", "python"), blocks("CONTRIBUTING.md", "yaml")
    environment = copied(tmp_path / "repository", function, rope__halved8=chain, experiment__halved8=experiment)

    def command(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path / "repository", capture_output=True, text=True,
                              check=False, env=environment)  # fmt: skip

    advised = command("scripts/analyze.py", "advise", "model=llama3_8b", "chain=halved8")
    assert advised.returncode == 0, advised.stderr
    (row,) = (line for line in advised.stdout.splitlines() if line.startswith("abf(theta=1e7) > halved(pairs=8) "))
    slowest = 2 * 2 * np.pi * 1e7 ** (63 / 64)
    assert row.split()[4] == f"{slowest:,.0f}"
    refused = command("scripts/analyze.py", "advise", "model=llama3_8b", "chain=halved(pairs=65)")
    assert refused.stderr == "error: halved: pairs=65 is not within the 64 pairs of a head; use 0..64\n"
    composed = command("train.py", "+experiment=halved8", "--cfg", "job")
    assert "method: halved" in composed.stdout, composed.stderr


@pytest.mark.slow
def test_one_function_and_one_yaml_are_enough(tmp_path, store_64):
    root = tmp_path / "repository"
    (function,) = (one for one in blocks("docs/position.md", "python") if "register_method(" in one)
    (chain,) = blocks("docs/position.md", "yaml")
    copied(root, function, rope__thirds=chain)
    run, text = tmp_path / "run", tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("the rope is walked and the walk is long. " * 60)
    architecture = ("hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, "
                    "num_key_value_heads: 1, head_dim: 16, vocab_size: 512, model_type: llama")  # fmt: skip
    _, exported, evaluated, inspected, advised, _ = run_commands([
        ["train.py", "+experiment=demo/pretrain", "rope=thirds", "tracker=none", "data=packed",
         f"data.store={store_64.root}", "data.sequence_length=64", f"run_dir={run}", "run_name=thirds",
         "model.pretrained_length=64", "model.head_dim=16", f"++model.architecture={{{architecture}}}",
         "trainer.max_steps=2", "trainer.global_batch_size=2", "trainer.micro_batch_size=2",
         "trainer.checkpoint_every=2"],
        ["scripts/export.py", f"checkpoint={run}"],
        ["scripts/evaluate.py", f"checkpoint={run}", f"output={tmp_path / 'evaluation'}", "device=cpu",
         f"documents={text}", "lengths=[64,128]", "dtype=float32", "needle.samples=0"],
        ["scripts/analyze.py", "inspect", f"model={run}"],
        ["scripts/analyze.py", "advise", f"model={run}", "chain=thirds(factor=8)"],
        ["scripts/analyze.py", "figures", "methods=[rope,thirds]", f"output={tmp_path / 'figures'}", "formats=[png]"],
    ], root)  # fmt: skip
    assert "thirds(factor=4)" in exported + (run / "run.json").read_text()
    config = json.loads((run / "export" / "config.json").read_text())
    factors = np.array(config["rope_parameters"]["long_factor"])
    np.testing.assert_allclose(factors, np.tile([1.0, 1.0, 4.0], 3)[:8], rtol=1e-12)
    assert json.loads((run / "export" / "verification.json").read_text())["passed"] is True
    assert "under thirds(factor=4)" in evaluated
    assert "chain: thirds(factor=4)" in inspected
    assert "thirds(factor=8)" in advised
    assert len(list((tmp_path / "figures").glob("*.png"))) >= 8
