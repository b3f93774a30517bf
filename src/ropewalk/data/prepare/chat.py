"""Conversations: read from rows, and as tokens, with a mask of what the assistant said."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateSyntaxError
from numpy.typing import NDArray

from ropewalk.data.prepare.token_files import BadRow, check_unicode
from ropewalk.errors import UserError

Message = dict[str, Any]
# Fields that a conversation is another without; a template that does not name one would drop it in silence.
CHANGING = {"tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "tool_plan"}
# Columns that would change a conversation too, or that it is about
UNREAD = (
    "functions", "chat_template_kwargs", "documents", "image", "images", "video", "videos", "audio", "audios",
)  # fmt: skip
COLUMNS = ("system", "tools", *UNREAD)  # beside the messages
NOW = re.compile(r"\bstrftime_now\s*\(")
NOW_IN = re.compile(r"""\bstrftime_now\s*\(\s*(['"])([^'"\\]*)\1\s*\)""")


def read_template(path: str) -> str:
    """The text of a Jinja file.

    Raises:
        UserError: it is not UTF-8, or cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"corpus.chat_template={path} cannot be read ({error}); save it as UTF-8") from error


class ChatEncoder:
    """Puts conversations through a chat template; only what the assistant says is trained.

    That is each stretch in ``{% generation %}`` where the template has such marks, else what each assistant message
    adds to the conversation before it, end-of-turn token included. A token across the edge is the assistant's, as
    transformers has it.

    Attributes:
        unused: fields of messages that the template does not use, and how many conversations had each.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, today: date | None = None) -> None:
        """Take a transformers fast tokenizer and a Jinja template.

        Args:
            tokenizer: copied, since here special tokens are encoded as such.
            template: None: the tokenizer's own.
            today: what a template gets that asks for the date.

        Raises:
            UserError: where there is no template, it has a syntax error, or it asks for the date and there is none.
        """
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.backend_tokenizer.encode_special_tokens = False
        template = template or tokenizer.chat_template
        if isinstance(template, dict):
            names = ", ".join(template)
            raise UserError(
                f"{tokenizer.name_or_path} has several chat templates ({names}); save the right one as a file and set "
                "corpus.chat_template=FILE"
            )
        if not isinstance(template, str):
            raise UserError(f"{tokenizer.name_or_path} has no chat template; set corpus.chat_template=FILE")
        self._template = _dated(template, today)
        self._marked = "{% generation" in self._template or "{%- generation" in self._template
        added = self._tokenizer.added_tokens_decoder.values()
        self._special = tuple(token.content for token in added if token.special)
        self.unused = Counter[str]()
        self._unwritten: dict[Any, str | None] = {}
        try:
            self._render([{"role": "user", "content": "Hi"}])
        except TemplateSyntaxError as error:
            where = f"line {error.lineno} of the chat template"
            raise UserError(f"{where} has a syntax error: {error}; correct it") from error
        except Exception:  # it may refuse this conversation, and not others
            pass

    def encode(
        self, messages: Sequence[Message], tools: list[Any] | None = None
    ) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Tokens uint32 (n,) and loss mask bool (n,) of a conversation.

        The template is given what it names of a message. An assistant's message of ``weight`` 0 is not trained.

        Raises:
            BadRow: no assistant speaks; a message has the text of a special token and could end its own turn; the
                template refuses the conversation, leaves a message out, or does not use a field that changes it.
            UserError: for a template that takes back what it wrote when a message follows.
        """
        if any(special in text for text in _texts([*messages, tools]) for special in self._special):
            raise BadRow("special token in a message")
        if tools is not None and not self._names("tools"):
            raise BadRow("tools, which the chat template does not use")
        given = [self._given(message) for message in messages]
        weights = [_weight(message) for message in messages if message["role"] == "assistant"]
        try:
            text, spans = self._generated(given, tools) if self._marked else self._added(given, tools)
        except UserError:
            raise
        except Exception as error:  # a template is the user's code
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadRow("refused by the chat template", reason) from error
        if (role := self._role_left_out(given, tools)) is not None:
            raise BadRow("a message that the chat template leaves out", f"role {role}")
        if 0 in weights and len(spans) != len(weights):
            raise BadRow("weight 0, where the template's marks are not one for each message of the assistant")
        if len(spans) == len(weights):
            spans = [span for span, weight in zip(spans, weights, strict=True) if weight]
        encoding = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        mask = np.zeros(len(encoding.ids), dtype=np.bool_)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        for start, end in spans:
            mask |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        if not mask.any():
            raise BadRow("no assistant")
        for name in {name for message in messages for name in message.keys() - {"role", "content", "weight"}}:
            if not self._names(name):
                self.unused[name] += 1
        return np.array(encoding.ids, dtype=np.uint32), mask

    def _names(self, field: str) -> bool:
        return re.search(rf"\b{re.escape(field)}\b", self._template) is not None

    def _given(self, message: Message) -> Message:
        """The fields of a message that the template names."""
        named = {name: field for name, field in message.items() if name in ("role", "content") or self._names(name)}
        if missing := sorted((message.keys() & CHANGING) - named.keys()):
            raise BadRow(f"{missing[0]} of a message, which the chat template does not use")
        others = message.keys() - {"role", "content", "weight"}
        if not message["content"] and others and not others & named.keys():
            raise BadRow("a message without content, whose fields the chat template does not use", sorted(others)[0])
        return named

    def _role_left_out(self, messages: Sequence[Message], tools: list[Any] | None) -> str | None:
        """The role of the first message whose content the template does not write; None: it writes all.

        Every content is put through the template as a mark, once for each sequence of roles and fields.
        """
        form = tools is None, *((message["role"], bool(message["content"]), *message) for message in messages)
        if form not in self._unwritten:
            marked = [
                {**message, "content": f"(message {index})"} if message["content"] else message
                for index, message in enumerate(messages)
            ]
            try:
                text = self._render(marked, tools)
                left_out = [message["role"] for message in marked if message["content"] not in text]
            except Exception:  # it looks into the contents
                left_out = []
            self._unwritten[form] = next(iter(left_out), None)
        return self._unwritten[form]

    def _generated(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            [list(messages)],
            tools=tools,
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return rendered[0], spans[0]

    def _added(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[str, list[tuple[int, int]]]:
        whole = self._render(messages, tools)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prefix = self._render(messages[:index], tools, prompt=True) if index else ""
            turn = self._render(messages[: index + 1], tools)
            if not turn.startswith(prefix) or not whole.startswith(turn):
                raise UserError(
                    "the chat template changes earlier messages when one follows, so what the assistant said cannot be "
                    "told apart; mark it with {% generation %} in a template of your own: corpus.chat_template=FILE"
                )
            spans.append((len(prefix), len(turn)))
        return whole, spans

    def _render(self, messages: Sequence[Message], tools: list[Any] | None = None, prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=self._template, tokenize=False, add_generation_prompt=prompt
        )


def _dated(template: str, today: date | None) -> str:
    """The template with the date in place of each ``strftime_now(FORMAT)``; transformers takes the day it runs on.

    transformers lets no function of the caller's into a template, so the date is written into its text.
    """
    if today is not None:
        template = NOW_IN.sub(lambda call: json.dumps(today.strftime(call[2])), template)
    if NOW.search(template):
        why = "set corpus.chat_date=YYYY-MM-DD" if today is None else "call it with a format in quotes"
        raise UserError(
            f"the chat template asks for today's date (strftime_now), so its tokens would depend on the day; {why}, or "
            "name a template without it: corpus.chat_template=FILE"
        )
    return template


def _weight(message: Message) -> int:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise BadRow("weight of a message, which is neither 0 nor 1", str(weight))
    return int(weight)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a conversation, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)


_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # ShareGPT's names


def read_messages(value: Any, system: Any = None) -> tuple[dict[str, Any], ...]:
    """The messages of a conversation, ``role`` and ``content`` first, without what is null or empty.

    ShareGPT's ``from`` and ``value`` are read too. A content that is a list of parts of text is joined.

    Args:
        value: of the column.
        system: of the row's own column of that name: the first message, where that is not the system's.

    Raises:
        BadRow: for anything else.
    """
    if isinstance(value, str):
        value = _from_json(value, "messages")
    if not isinstance(value, (list, tuple)) or not value:
        raise BadRow("null" if value is None else "no messages" if value == [] else "messages that are not a list")
    messages = [_message(message) for message in value]
    if system and not isinstance(system, str):
        raise BadRow(f"a system column that is {type(system).__name__}, not text")
    if system and system.strip():
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        elif messages[0]["content"].strip() != system.strip():
            raise BadRow("a system column beside another system message")
    _check_texts(messages)
    return tuple(messages)


def _check_texts(value: Any) -> None:
    try:
        check_unicode(json.dumps(value, ensure_ascii=False, default=str))
    except RecursionError:
        raise BadRow("nested too deep") from None


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRow("a message that is not an object")
    fields = {key: field for key, field in message.items() if field is not None and field not in ("", [], {})}
    if "role" not in fields and "from" in fields:
        role, content = fields.pop("from"), fields.pop("value", "")
        if role not in (*_ROLES, *_ROLES.values(), "system"):
            raise BadRow("a role that ShareGPT's form does not have", str(role))
        role = _ROLES.get(role, role)
    else:
        role, content = fields.pop("role", None), fields.pop("content", "")
    if not isinstance(role, str):
        raise BadRow("a message without a role")
    if isinstance(content, (list, tuple)):
        kinds = {str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__ for part in content}
        if kinds - {"text"}:
            raise BadRow(f"a content part of type {sorted(kinds - {'text'})[0]}")
        if not all(isinstance(part.get("text"), str) for part in content):
            raise BadRow("a content part of type text without a text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRow(f"a content that is {type(content).__name__}, not text")
    if message.get("content") is None and message.get("value") is None and not fields:
        raise BadRow("a message without content")
    return {"role": role, "content": content, **fields}


def _from_json(text: str, name: str) -> Any:
    """A column that holds JSON as text, as tables without nested columns do."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(f"{name} that are not JSON") from None


def read_tools(tools: Any) -> list[Any] | None:
    """The tools of a conversation's row, which may be JSON; None: it has none.

    Raises:
        BadRow: for anything else.
    """
    if isinstance(tools, str) and tools.strip():
        tools = _from_json(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRow("tools that are not a list")
    _check_texts(tools)
    return tools


def check_columns(row: Mapping[str, Any]) -> None:
    """Raise BadRow for a conversation's row with a column of UNREAD that is not empty."""
    if unread := next((name for name in UNREAD if row.get(name)), None):
        raise BadRow(f"a column {unread}, which is not read")
