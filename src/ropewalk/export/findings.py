"""verification.json: what each verification of an export found."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ropewalk.errors import UserError
from ropewalk.export.source import read_json
from ropewalk.files import write_atomically

REPORT = "verification.json"
STOCK = "transformers"  # its finding's numbers stand at the top level too, where the report reads them


class Unverifiable(UserError):
    """A verification that cannot run, and why; no judgement on the export."""


class NotVerified(RuntimeError):
    """An export that an engine does not reproduce; what was written stays."""


@dataclass(frozen=True)
class EngineFailed:
    """An engine that did not get as far as logits."""

    error: str
    passed: bool = False

    def __str__(self) -> str:
        return f"NOT VERIFIED: {self.error}"


def write_finding(directory: Path, engine: str, finding: Any) -> None:
    """Record one verification; ``passed`` of the whole is that of all that ran.

    Args:
        directory: the export.
        engine: what was compared with, e.g. "transformers", "llama.cpp model-q8_0.gguf".
        finding: a dataclass with ``passed`` (None: it ran but could not tell), or the reason, a string, why it could
            not run.
    """
    report = read_json(directory / REPORT)
    engines = report.get("engines", {})
    entry = {"passed": None, "reason": finding} if isinstance(finding, str) else asdict(finding)
    engines[engine] = {**entry, "said": str(finding)}
    ran = [found["passed"] for found in engines.values() if found["passed"] is not None]
    top = {k: v for k, v in engines.get(STOCK, {}).items() if k not in ("said", "reason")}
    report = {**top, "passed": bool(ran) and all(ran), "engines": engines}
    write_atomically(directory / REPORT, json.dumps(report, indent=2) + "\n")


def findings_of(directory: Path) -> dict[str, dict[str, Any]]:
    """The findings by engine; empty where nothing was verified."""
    return dict(read_json(directory / REPORT).get("engines", {}))
