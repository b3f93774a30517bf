"""A method of one's own: one function in one file and one YAML, and every command has it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import alone_environment

from ropewalk.entry import CONFIG_DIR

ROOT = CONFIG_DIR.parent

FUNCTION = '''"""Every third pair at half speed."""

from ropewalk.rope import Spectrum, register_method


@register_method("thirds")
def thirds(spectrum: Spectrum, *, factor: float = 2.0) -> Spectrum:
    """Every third pair turns slower by ``factor``."""
    weights = [1 / factor if pair % 3 == 2 else 1.0 for pair in range(spectrum.inv_freq.size)]
    return spectrum.scaled(weights)
'''
YAML = "name: thirds\nchain:\n  - {method: thirds, factor: 4.0}\n"


@pytest.mark.slow
def test_one_function_and_one_yaml_are_enough(tmp_path, store_64):
    root = tmp_path / "repository"
    for folder in ("src", "configs", "scripts"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    shutil.copy(ROOT / "train.py", root)
    (root / "src/ropewalk/rope/methods/thirds.py").write_text(FUNCTION)
    (root / "configs/rope/thirds.yaml").write_text(YAML)
    environment = {**alone_environment(), "PYTHONPATH": str(root / "src")}

    def command(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, check=False,
                              env=environment)  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    run = tmp_path / "run"
    architecture = ("hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, "
                    "num_key_value_heads: 1, head_dim: 16, vocab_size: 512, model_type: llama")  # fmt: skip
    command("train.py", "+experiment=demo/pretrain", "rope=thirds", "tracker=none", "data=packed",
            f"data.store={store_64.root}", "data.sequence_length=64", f"run_dir={run}", "run_name=thirds",
            "model.pretrained_length=64", "model.head_dim=16", f"++model.architecture={{{architecture}}}",
            "trainer.max_steps=2", "trainer.global_batch_size=2", "trainer.micro_batch_size=2",
            "trainer.checkpoint_every=2")  # fmt: skip
    assert "thirds(factor=4)" in command("scripts/export.py", f"checkpoint={run}") + (run / "run.json").read_text()
    config = json.loads((run / "export" / "config.json").read_text())
    factors = np.array(config["rope_parameters"]["long_factor"])
    np.testing.assert_allclose(factors, np.tile([1.0, 1.0, 4.0], 3)[:8], rtol=1e-12)
    assert json.loads((run / "export" / "verification.json").read_text())["passed"] is True
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the rope is walked and the walk is long. " * 60)
    said = command("scripts/evaluate.py", f"checkpoint={run}", f"output={tmp_path / 'evaluation'}", "device=cpu",
                   f"documents={tmp_path / 'text'}", "lengths=[64,128]", "dtype=float32",
                   "needle.samples=0")  # fmt: skip
    assert "under thirds(factor=4)" in said
    assert "chain: thirds(factor=4)" in command("scripts/analyze.py", "inspect", f"model={run}")
    assert "thirds(factor=8)" in command("scripts/analyze.py", "advise", f"model={run}", "chain=thirds(factor=8)")
    command("scripts/analyze.py", "figures", "methods=[rope,thirds]", f"output={tmp_path / 'figures'}", "formats=[png]")
    assert len(list((tmp_path / "figures").glob("*.png"))) >= 8
