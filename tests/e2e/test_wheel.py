"""A wheel outside the checkout: its configs, its commands, and what its base needs."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from helpers import alone_environment
from ranks import tiny_arguments

from ropewalk.config import CONFIG_DIR

ROOT = CONFIG_DIR.parent
BUILT_OF = (
    "LICENSE", "MANIFEST.in", "README.md", "configs", "data_prep", "pyproject.toml", "scripts", "setup.py", "src",
    "train.py",
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel, unpacked into a folder of its own; its dependencies are the test environment's."""
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    for name in BUILT_OF:  # building leaves files beside them
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source], check=True)
    (wheel,) = wheels.glob("ropewalk-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    return site


def run(site: Path, empty: Path, *command: str) -> str:
    environment = {**alone_environment(), "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    if not command[0].endswith("python"):
        command = (sys.executable, str(site / "bin" / command[0]), *command[1:])
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_step_is_trained_from_an_empty_directory(site, tmp_path, store_64):
    where = run(site, tmp_path, sys.executable, "-c", "import ropewalk.config as c; print(c.__file__, c.CONFIG_DIR)")
    assert where.split() == [str(site / "ropewalk/config/__init__.py"), str(site / "ropewalk/configs")]
    said = run(site, tmp_path, "ropewalk-train", *tiny_arguments(store_64, tmp_path / "out", "trainer.max_steps=1"))
    assert "finished: " in said
    run(site, tmp_path, "ropewalk-export", "checkpoint=out", "output=exported")
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_its_commands_find_their_scripts(site, tmp_path):
    commands = sorted(path.name for path in (site / "bin").iterdir())
    scripts = [
        path.stem.replace("_", "-") for folder in ("scripts", "data_prep") for path in (ROOT / folder).glob("*.py")
    ]
    in_checkout = {"inspect", "job", "gpu-check"}  # an old name, jobs of slurm/, a check of the checkout itself
    assert commands == sorted(f"ropewalk-{name}" for name in {"train", *scripts} - in_checkout)
    assert "clip" in run(site, tmp_path, "ropewalk-analyze", "advise", "model=llama3_8b")


def test_its_base_is_numpy_alone(site, tmp_path):
    """Without the environment's packages but that one."""
    (tmp_path / "numpy").symlink_to(Path(numpy.__file__).parent)
    libraries = Path(numpy.__file__).parents[1] / "numpy.libs"
    (tmp_path / libraries.name).symlink_to(libraries)
    first = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(site)!r}]; "
    code = "import ropewalk.rope; print(ropewalk.rope.__file__)"
    assert run(site, tmp_path, sys.executable, "-I", "-S", "-c", first + code).startswith(str(site))
