"""What pyproject.toml cannot say: a wheel holds the checkout's configs/ and commands, which stay where they are."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithCommands(build_py):
    """Copies them into the package, where ropewalk.config and ropewalk.console look first."""

    def run(self):
        """Build, then copy; an editable installation reads the checkout."""
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib, "ropewalk")
        for pattern in ("configs/**/*.yaml", "scripts/*.py", "data_prep/*.py", "train.py"):
            for file in filter(Path.is_file, Path().glob(pattern)):
                copy = package / (file if file.parent.name else Path("scripts", file))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)


setup(cmdclass={"build_py": WithCommands})
