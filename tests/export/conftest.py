"""Runs and exports that several test files of the export look at."""

import pytest
from helpers import composed, save_tiny, tiny_run

from ropewalk.export import export
from ropewalk.training import train

ABF = {"method": "abf", "theta": 1e5}
ARMS = {
    "rope": [],
    "cope": [ABF, {"method": "cope", "clip": 4}],
    "hardclip": [ABF, {"method": "hardclip", "clip": 4}],
    "cope_yarn": [ABF, {"method": "cope", "clip": 4}],  # exported with test_time=yarn4
}


@pytest.fixture(scope="session")
def train_arm(store_64, tmp_path_factory):
    """``train_arm(chain)``: a run of two steps from weights that are large enough for positions to matter."""
    root = tmp_path_factory.mktemp("arms")
    base = save_tiny(root / "base", tie_word_embeddings=True)
    runs = {}

    def run(chain):
        if str(chain) not in runs:
            run_dir = root / f"run{len(runs)}"
            config = tiny_run(store_64, run_dir, "model=demo_base", f"model.path={base}", "model.head_dim=16",
                              "model.pretrained_length=64", "trainer.max_steps=2")  # fmt: skip
            config.rope.chain = chain
            train(config)
            runs[str(chain)] = run_dir
        return runs[str(chain)]

    return run


@pytest.fixture(scope="session")
def exported_arm(train_arm, tmp_path_factory):
    """``exported_arm(name)``: an arm of ARMS as a verified Hugging Face directory with a GGUF file in it."""
    root, made = tmp_path_factory.mktemp("exported"), {}

    def directory(name):
        if name not in made:
            scaled = ["test_time=yarn4"] if name == "cope_yarn" else []
            made[name] = export(
                composed(
                    "export",
                    f"checkpoint={train_arm(ARMS[name])}",
                    "to=all",
                    "verify_tokens=512",
                    f"output={root / name}",
                    *scaled,
                )
            )
        return made[name]

    return directory
