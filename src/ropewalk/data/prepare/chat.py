"""Conversations as tokens, and which of them the assistant said."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Sequence
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.errors import UserError

Message = dict[str, str]
NOW = re.compile(r"\bstrftime_now\s*\(")
NOW_IN = re.compile(r"""\bstrftime_now\s*\(\s*(['"])([^'"\\]*)\1\s*\)""")


class ChatEncoder:
    """Puts conversations through a chat template; only what the assistant says is trained.

    That is each stretch in ``{% generation %}`` where the template has such marks, else what each assistant message
    adds to the conversation before it, end-of-turn token included. A token across the edge is the assistant's, as
    transformers has it.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, today: date | None = None) -> None:
        """Take a transformers fast tokenizer and a Jinja template.

        Args:
            tokenizer: copied, since here special tokens are encoded as such.
            template: None: the tokenizer's own.
            today: what a template gets that asks for the date.

        Raises:
            UserError: where there is no template, or it asks for the date and there is none.
        """
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.backend_tokenizer.encode_special_tokens = False
        template = template or tokenizer.chat_template
        if not isinstance(template, str):
            raise UserError(f"{tokenizer.name_or_path} has no chat template; set corpus.chat_template=FILE")
        self._template = _dated(template, today)
        self._marked = "{% generation" in self._template or "{%- generation" in self._template
        added = self._tokenizer.added_tokens_decoder.values()
        self._special = tuple(token.content for token in added if token.special)

    def encode(
        self, messages: Sequence[Message], skipped: Counter[str]
    ) -> tuple[NDArray[np.uint32], NDArray[np.bool_]] | None:
        """Tokens uint32 (n,) and loss mask bool (n,); None where the conversation is left out, which is counted.

        Left out is a conversation in which no assistant speaks, or where a message has the text of a special token and
        could end its own turn.

        Raises:
            UserError: for a template that takes back what it wrote when a message follows.
        """
        if any(special in message["content"] for message in messages for special in self._special):
            skipped["special token in a message"] += 1
            return None
        text, spans = self._generated(messages) if self._marked else self._added(messages)
        encoding = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        mask = np.zeros(len(encoding.ids), dtype=np.bool_)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        for start, end in spans:
            mask |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        if not mask.any():
            skipped["no assistant"] += 1
            return None
        return np.array(encoding.ids, dtype=np.uint32), mask

    def _generated(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            [list(messages)],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return rendered[0], spans[0]

    def _added(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        whole = self._render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prefix = self._render(messages[:index], prompt=True) if index else ""
            turn = self._render(messages[: index + 1])
            if not turn.startswith(prefix) or not whole.startswith(turn):
                raise UserError(
                    "the chat template changes earlier messages when one follows, so what the assistant said cannot be "
                    "told apart; mark it with {% generation %} in a template of your own: corpus.chat_template=FILE"
                )
            spans.append((len(prefix), len(turn)))
        return whole, spans

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=prompt
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
