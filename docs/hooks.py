"""Keep the site's navigation true to docs/: a page that is not there is left out, one that is not named comes last."""

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Called by MkDocs once its configuration is read."""
    pages = {path.name for path in Path(config.docs_dir).glob("*.md")}
    named = [entry for entry in config.nav if next(iter(entry.values())) in pages]
    config.nav = [*named, *sorted(pages - {next(iter(entry.values())) for entry in named})]
    return config
