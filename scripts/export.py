"""Checkpoints and models for stock engines: ``python scripts/export.py checkpoint=outputs/my_run``.

``python scripts/export.py check DIR_OR_GGUF_OR_RUN`` and ``export.py repair model=DIR rope=cope20 output=DIR``.
"""

import shlex
import sys

from ropewalk.cli import entry, run_command
from ropewalk.config.export import CheckExportConfig, ExportConfig, RepairConfig


@entry("export")
def main(config: ExportConfig) -> None:
    """Export and verify one checkpoint or model."""
    from ropewalk.export import export
    from ropewalk.export.output import NotVerified
    from ropewalk.files import read_object

    try:
        output = export(config)
    except NotVerified as failed:
        sys.exit(f"error: {failed}")  # exit code 1
    import torch

    print(f"result: {output}")
    if (output / "config.json").is_file() and "vision_config" in read_object(output / "config.json"):
        print(f"next: {output}/README.md has the lines that make its position ids")
    elif config.to != "gguf":
        device = "" if torch.cuda.is_available() else " device=cpu dtype=float32"
        print(
            f"next: python scripts/generate.py checkpoint={shlex.quote(str(output))} prompt='Once upon a time'{device}"
        )


@entry("check_export")
def check(config: CheckExportConfig) -> None:
    """Whether a directory or GGUF file carries the method that it claims."""
    from ropewalk.export.verify.check_export import print_check

    if not print_check(config.model.path):
        sys.exit(1)


@entry("repair")
def repair(config: RepairConfig) -> None:
    """Give a checkpoint the config of the method that it was trained with."""
    from ropewalk.export.command import repair as run

    run(config)


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"] and sys.argv[2:] and "=" not in sys.argv[2] and not sys.argv[2].startswith("-"):
        sys.argv[2] = f"model={sys.argv[2]}"
    run_command({"export": main, "check": check, "repair": repair}, default="export")
