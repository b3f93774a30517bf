"""Console commands: ``ropewalk-train`` for train.py, ``ropewalk-evaluate`` for scripts/evaluate.py, and so on."""

import runpy
import sys
from pathlib import Path

from ropewalk.config import CONFIG_DIR


def main() -> None:
    """Run the script that the command is named after, with the arguments as they are."""
    name = Path(sys.argv[0]).stem.removeprefix("ropewalk-").replace("-", "_")
    root = CONFIG_DIR.parent
    files = (root / folder / f"{name}.py" for folder in ("scripts", "data_prep", "."))
    script = next(file for file in files if file.is_file())
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
