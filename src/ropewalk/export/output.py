"""The output directory of an export: one writer, written beside first, nothing replaced unasked, findings kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ropewalk.errors import UserError
from ropewalk.files import only_writer, read_object, write_atomically, writing

SOURCE = "export.json"  # which checkpoint an export came from; written last
REPORT = "verification.json"
STOCK = "transformers"  # its finding's numbers stand at the top level too, where the report reads them


@contextmanager
def only_export(output: Path) -> Iterator[None]:
    """Hold ``output`` against other exports, on every node that sees it; a full or unwritable disk is one line.

    Raises:
        UserError: where another export is writing there, or the disk takes no more.
    """
    name = f"output={output}"  # its owner is named beside it, since it is replaced as a whole
    with writing(name, output.parent), only_writer(output.parent, name, f".{output.name}.owner"):
        yield


def check_replaceable(output: Path, overwrite: bool) -> None:
    """Raise UserError where ``output`` holds files that may not be replaced."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; name a directory")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output} is not empty; name another output or allow it with overwrite=true")
    if not (output / SOURCE).exists():
        raise UserError(f"{output} is not an earlier export, so it is not replaced; name another output")


def check_addable(output: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    """Raise UserError where ``output`` holds something else than files of the export that ``identity`` describes."""
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / SOURCE).is_file():
        raise UserError(f"{output} is not empty and is not an earlier export; name another output")
    present = read_object(output / SOURCE)
    if not overwrite and not _same_export(present, identity):
        raise UserError(f"{output} holds another export; name another output or allow it with overwrite=true")


def begin_adding(output: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    """Make ``output`` ready for files of the export that ``identity`` describes, beside those of it that are there.

    GGUF files of another export and its findings would stand under the new card, so they are deleted.

    Raises:
        UserError: from :func:`check_addable`.
    """
    check_addable(output, identity, overwrite)
    output.mkdir(parents=True, exist_ok=True)
    source = output / SOURCE
    if source.is_file():
        if _same_export(read_object(source), identity):
            return
        for stale in (*output.glob("*.gguf"), output / REPORT):
            stale.unlink(missing_ok=True)
    write_atomically(source, json.dumps({**identity, "dtype": "gguf"}, indent=2) + "\n")


def _same_export(identity: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return {**identity, "dtype": None} == {**other, "dtype": None}


@contextmanager
def written_beside(output: Path, needed: int | None = None) -> Iterator[Path]:
    """A directory beside ``output`` that becomes it when the block ends well; on an error it is removed.

    A full disk gets its space back, and what stood at ``output`` stands.

    Args:
        output: directory.
        needed: bytes that are written, for the error of a full disk; None: few.
    """
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    with writing(f"output={output}", output, None if needed is None else lambda: needed):
        try:
            partial.mkdir(parents=True)
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)


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
    return dict(read_object(directory / REPORT).get("engines", {}))
