"""Findings of a check, and a screen of those of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ropewalk.errors import UserError

LEVELS = ("ok", "warn", "FAIL")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's screen.

    Attributes:
        level: ok, warn (the job would run, slower or at a risk) or FAIL (it would not).
        subject: what was looked at.
        text: what was found; for warn and FAIL with the fix.
    """

    level: str
    subject: str
    text: str


def ok(subject: str, text: str) -> Finding:
    """All is well."""
    return Finding("ok", subject, text)


def warn(subject: str, text: str) -> Finding:
    """The job would run, slower or at a risk."""
    return Finding("warn", subject, text)


def fail(subject: str, text: str) -> Finding:
    """The job would not run."""
    return Finding("FAIL", subject, text)


def guarded(subject: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check; one that breaks is a finding itself, and the next is made all the same."""
    try:
        return list(check())
    except Exception as error:  # whatever it is, the user has to see it beside the rest
        words = " ".join(str(error).split()) or "no message"
        return [fail(subject, (words if isinstance(error, UserError) else f"{type(error).__name__}: {words}")[:400])]


def screen(title: str, of_ranks: Sequence[tuple[str, Sequence[Finding]]]) -> tuple[str, int]:
    """One screen from the findings of all ranks.

    Args:
        title: first line.
        of_ranks: for each rank its node and what it found.

    Returns:
        The text, and how many distinct findings are FAIL. Equal findings are one line; one that was not made on every
        node names those where it was.
    """
    nodes_of: dict[Finding, list[str]] = {}
    for node, findings in of_ranks:
        for finding in findings:
            nodes_of.setdefault(finding, []).append(node)
    everywhere = {node for node, _ in of_ranks}
    order = list(dict.fromkeys(finding.subject for finding in nodes_of))
    lines = [title]
    for finding in sorted(nodes_of, key=lambda finding: order.index(finding.subject)):
        nodes = nodes_of[finding]
        where = "" if set(nodes) == everywhere else f"  [{_few(nodes)}]"
        lines.append(f"  {finding.level:<4} {finding.subject:<12} {finding.text}{where}")
    counts = {level: sum(finding.level == level for finding in nodes_of) for level in LEVELS}
    lines.append(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['FAIL']} to fix")
    return "\n".join(lines), counts["FAIL"]


def _few(nodes: Sequence[str]) -> str:
    names = sorted(set(nodes))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
