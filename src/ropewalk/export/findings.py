"""Findings of verifications, and verification.json, which keeps those of engines beside an export."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    """An export that an engine does not reproduce; its files stay."""


@dataclass(frozen=True)
class Finding:
    """The result of one verification: of the files without an engine, or by one engine.

    Attributes:
        passed: None: it could not run, or could not tell.
        text: the result in words.
        numbers: what an engine was measured by, as verification.json keeps it.
    """

    passed: bool | None
    text: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


def judged(passed: bool | None, text: str, faults: list[str], **numbers: Any) -> Finding:
    """An engine's finding; faults of the static verification fail it, whatever the engine computed."""
    passed = False if faults else passed
    verdict = {True: "verified", False: "NOT VERIFIED", None: "could not tell"}[passed]
    return Finding(passed, f"{verdict}: {'; '.join([text, *faults])}", {**numbers, "faults": faults})


def record(directory: Path, engine: str, verify: Callable[[], Finding]) -> Finding:
    """Run an engine's verification and write its finding to verification.json, also that it could not run.

    Args:
        directory: the export; ``passed`` of the whole is that of all that ran.
        engine: what the export is compared with, e.g. "transformers", "llama.cpp model-q8_0.gguf".
        verify: the verification; a RuntimeError is an engine that did not get as far as numbers, and fails.
    """
    try:
        finding = verify()
    except Unverifiable as reason:
        finding = Finding(None, str(reason), {"reason": str(reason)})
    except RuntimeError as error:
        finding = Finding(False, f"NOT VERIFIED: {error}", {"error": str(error)})
    engines = findings_of(directory)
    engines[engine] = {**finding.numbers, "passed": finding.passed, "said": finding.text}
    ran = [entry["passed"] for entry in engines.values() if entry["passed"] is not None]
    top = {key: value for key, value in engines.get(STOCK, {}).items() if key not in ("said", "reason")}
    report = {**top, "passed": bool(ran) and all(ran), "engines": engines}
    write_atomically(directory / REPORT, json.dumps(report, indent=2) + "\n")
    return finding


def findings_of(directory: Path) -> dict[str, dict[str, Any]]:
    """The findings by engine, as verification.json has them; empty where nothing was verified."""
    return dict(read_json(directory / REPORT).get("engines", {}))
