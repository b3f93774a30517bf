"""Run directories are read where torch would cost seconds: before a job, in a report."""

import pkgutil
import subprocess
import sys

import ropewalk.runs


def test_no_module_imports_torch():
    modules = [f"ropewalk.runs.{module.name}" for module in pkgutil.iter_modules(ropewalk.runs.__path__)]
    assert "ropewalk.runs.directory" in modules
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_rank_takes_its_place_before_anything_that_takes_long_to_import():
    code = "import sys, ropewalk.runs.launch; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "numpy", "pandas", "omegaconf", "transformers"} & set(imported)
