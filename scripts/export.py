"""Export a training checkpoint for stock engines: ``python scripts/export.py checkpoint=outputs/my_run``."""

from ropewalk.config import ExportConfig
from ropewalk.entry import entry


@entry("export")
def main(config: ExportConfig) -> None:
    """Export and verify one checkpoint."""
    from ropewalk.export import export

    export(config)


if __name__ == "__main__":
    main()
