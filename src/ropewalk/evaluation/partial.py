"""What an unfinished evaluation has measured so far, so that a killed one goes on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from ropewalk.files import replace_atomically

PARTIAL = "partial"


class Partial:
    """Tables of one evaluation, kept under the hash of its identity, so that another one never reads them.

    Args:
        output: of the evaluation.
        identity: what its numbers depend on.
        writes: whether this process writes; of several, the first does.
    """

    def __init__(self, output: Path, identity: Mapping[str, str], writes: bool = True) -> None:
        digest = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()
        self.directory = output / PARTIAL / digest[:16]
        self.writes = writes

    def has(self, name: str) -> bool:
        """Whether the table ``name`` was measured."""
        return (self.directory / f"{name}.parquet").is_file()

    def table(self, name: str, measure: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table ``name``: read where it was measured, else measured and written."""
        path = self.directory / f"{name}.parquet"
        if path.is_file():
            return pd.read_parquet(path)
        measured = measure()
        if self.writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_atomically(path, lambda partial: measured.to_parquet(partial, index=False))
        return measured

    def remove(self) -> None:
        """Delete what is no longer needed: the whole of it, leftovers of other identities included."""
        if self.writes:
            shutil.rmtree(self.directory.parent, ignore_errors=True)
