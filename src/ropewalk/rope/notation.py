"""Steps of a chain, and their text form: ``abf(theta=1e7) > cope(clip=20)``."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

from ropewalk.errors import UserError
from ropewalk.rope.registry import get_method

_PRINTED = 8  # numbers of a list; a longer list is printed for people to see, not to be read back
_SHORTENED = re.compile(r"\[\d+ numbers\]")


@dataclass(frozen=True)
class Step:
    """One method of a chain with its canonical arguments."""

    method: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        defaults = get_method(self.method).defaults
        printed = {k: v for k, v in self.arguments.items() if k not in defaults or v != defaults[k]}
        return f"{self.method}({', '.join(f'{k}={print_value(v)}' for k, v in printed.items())})"


def print_value(value: Any) -> str:
    """A value as people write it, exactly: 1e7, 5e5, 0.25; of a long list, only its length, ``[64 numbers]``."""
    if isinstance(value, list) and len(value) > _PRINTED:
        return f"[{len(value)} numbers]"
    if isinstance(value, list):
        return f"[{', '.join(map(print_value, value))}]"
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    if abs(value) >= 1e4:
        mantissa, exponent = f"{value:e}".split("e")
        short = f"{float(mantissa):g}e{int(exponent)}"
    return short if float(short) == value else repr(value).removesuffix(".0")


def parse_steps(text: str) -> list[dict[str, Any]]:
    """The steps of a printed chain; ``rope``, or nothing, is the chain without any.

    Raises:
        UserError: for text of another form, or a list of which only the length was printed.
    """
    if shortened := _SHORTENED.search(text):
        raise UserError(
            f"{shortened[0]} in the chain {text!r} is a list that was shortened when printed; write its numbers out, "
            "or take the chain from where it is whole: RopeChain.to_list(), YAML, or RopeChain.from_pretrained(DIR)"
        )
    if text.strip() in ("", "rope"):
        return []
    return [_parse_step(part.strip(), text) for part in text.split(">")]


def _parse_step(part: str, text: str) -> dict[str, Any]:
    rule = "write NAME(argument=value, ...), joined by '>': abf(theta=1e7) > cope(clip=20)"
    try:
        call = ast.parse(part if "(" in part else f"{part}()", mode="eval").body
    except SyntaxError:
        raise UserError(f"{part!r} in the chain {text!r} is not a method; {rule}") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise UserError(f"{part!r} in the chain {text!r} is not a method; {rule}")
    names = [str(keyword.arg) for keyword in call.keywords]
    for name in names:
        if names.count(name) > 1 or name == "method":
            raise UserError(f"{part!r} in the chain {text!r} gives {name} twice; keep one")
    return {"method": call.func.id, **{str(k.arg): _literal(k.value, part) for k in call.keywords}}


def _literal(node: ast.expr, part: str) -> Any:
    """A number, true, false, null, a list, or a bare word."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "null": None, "none": None}.get(node.id.lower(), node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UserError(f"{part!r}: {ast.unparse(node)} is not a value; give a number, true, false or a word") from None
