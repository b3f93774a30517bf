"""The runner of the GPU check: a process and a line of JSON for each part, and the table of them on a page.

A part that is killed, or hangs past its limit, loses its own line's last values and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ropewalk.config import CONFIG_DIR
from ropewalk.errors import UserError

SCRIPT = CONFIG_DIR.parent / "scripts" / "gpu_check.py"
MARK = "gpu_check "  # begins a line with a value of a part
# Seconds of each part, in the order of their worth; eight minutes together.
LIMITS = {
    "machine": 30, "tests": 140, "resume": 50, "rotary": 20, "attention": 60, "loss": 30, "step": 130, "profile": 30,
}  # fmt: skip
RANK_LIMITS = {"data_parallel": 200, "shared_rows": 200, "exit": 100}  # of several ranks, under torchrun
PATIENCE = 10  # times the limits at the small size, as a machine without a GPU may have other work
BEGIN, END = "<!-- gpu_check: filled by scripts/gpu_check.py --page -->", "<!-- end of gpu_check -->"
ENVIRONMENT = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "WANDB_MODE": "offline"}
TAIL = 2000  # characters of a failed part's stderr


def emit(values: Iterable[tuple[str, Any]]) -> None:
    """Print each value of a part as soon as it is known, for the runner to read."""
    for name, value in values:
        print(MARK + json.dumps({name: value}), flush=True)


def run_parts(parts: Sequence[str], arguments: Sequence[str], output: Path) -> list[dict[str, Any]]:
    """Run parts one after the other, and append a line for each to ``output``.

    Under torchrun every rank calls this; each part's ranks meet on a port of their own, and rank 0 writes. A part whose
    name is in RANK_LIMITS is for such ranks.

    Args:
        parts: by name.
        arguments: of every part, for ``scripts/gpu_check.py``.
        output: JSON lines; what it holds already stays.

    Returns:
        The entries.
    """
    entries = []
    for number, part in enumerate(parts):
        limit = {**LIMITS, **RANK_LIMITS}[part] * (PATIENCE if "--small" in arguments else 1)
        entry = {"part": part, **run_part(part, arguments, limit, part_environment(os.environ, number))}
        if part == "exit":
            entry["rank"] = int(os.environ.get("RANK", "0"))
        if part == "exit" or os.environ.get("RANK", "0") == "0":
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            print(f"{part:<13} {entry['seconds']:6.1f} s  {entry.get('error', 'done')[-200:]}", flush=True)
        entries.append(entry)
    return entries


def run_part(part: str, arguments: Sequence[str], limit: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """One part in a process of its own, with what it has said until its end or its limit, in seconds."""
    start, reason = time.monotonic(), None
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--part", part, *arguments], env=dict(environment), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        reason = f"ended by its limit of {limit:g} s"
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        output, errors = process.communicate()
    ended = time.time()
    entry: dict[str, Any] = {"seconds": round(time.monotonic() - start, 2)}
    for line in output.splitlines():
        if line.startswith(MARK):
            entry |= json.loads(line.removeprefix(MARK))
    if "raised_at" in entry:
        entry["seconds_to_end"] = round(ended - entry.pop("raised_at"), 2)
    if reason or process.returncode:
        entry["error"] = reason or f"exit code {process.returncode}: {errors[-TAIL:]}"
    return entry


def part_environment(environment: Mapping[str, str], number: int) -> dict[str, str]:
    """The environment of part ``number``: under torchrun its ranks meet without the agent, on the next free port."""
    own = {**ENVIRONMENT, **{k: v for k, v in environment.items() if not k.startswith("TORCHELASTIC_")}}
    if "MASTER_PORT" in own:
        own["MASTER_PORT"] = str(int(own["MASTER_PORT"]) + 1 + number)
    return own


def fill_page(results: Path, page: Path) -> None:
    """Put the entries of ``results`` between the two marks of a Markdown page, in the place of what is there.

    Raises:
        UserError: the page has no such marks, or the file no entries.
    """
    entries = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines() if line]
    text = page.read_text(encoding="utf-8")
    if not entries or BEGIN not in text or END not in text:
        raise UserError(f"{results} must have entries, and {page} the lines {BEGIN} and {END}; run the check first")
    before, rest = text.split(BEGIN)
    page.write_text("\n".join([before + BEGIN, *_sections(entries), END + rest.split(END)[1]]), encoding="utf-8")


def _sections(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for entry in entries:
        tables = {name: rows for name, rows in entry.items() if isinstance(rows, list) and rows and _is_row(rows[0])}
        yield f"\n### {entry['part']}" + (f", rank {entry['rank']}" if "rank" in entry else "")
        plain = [{"value": k, "found": v} for k, v in entry.items() if k not in (*tables, "part", "rank")]
        for rows in (plain, *tables.values()):
            yield from _table(rows)


def _is_row(value: Any) -> bool:
    return isinstance(value, dict)


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    yield f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}"
    for row in rows:
        yield f"| {' | '.join(_cell(row.get(name)) for name in names)} |"


def _cell(value: Any) -> str:
    words = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(words.split()).replace("|", "\\|")[-300:]
