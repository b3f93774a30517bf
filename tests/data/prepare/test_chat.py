"""What the assistant says is trained, to the end of its turn, and nothing else."""

import json
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from ropewalk.config.data import CorpusConfig, DomainConfig, PrepareConfig, SourceConfig
from ropewalk.data import PackedStore
from ropewalk.data.prepare.chat import ChatEncoder, read_template
from ropewalk.data.prepare.pipeline import prepare
from ropewalk.data.prepare.token_files import BadRow
from ropewalk.data.prepare.tokenizer import load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}\n{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Où est le chat ? 🙂"},
    {"role": "assistant", "content": "Là, près du café."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "Gone."},
]


@pytest.fixture
def tokenizer(fixture_tokenizer):
    return load_tokenizer(str(fixture_tokenizer)).tokenizer


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_the_assistants_turns_are_trained(tokenizer, template):
    tokens, mask = ChatEncoder(tokenizer, template).encode(TALK)
    assert tokens.dtype == np.uint32
    whole = "<|begin_of_text|>" + "".join(f"[{m['role']}]\n{m['content']}<|end_of_text|>\n" for m in TALK)
    assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == whole
    assert np.count_nonzero(tokens == tokenizer.eos_token_id) == 5
    runs = np.split(tokens, np.flatnonzero(np.diff(mask)) + 1)
    said = [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
    assert said[1::2] == ["Là, près du café.<|end_of_text|>\n", "Gone.<|end_of_text|>\n"]
    assert not mask[0]


@pytest.mark.parametrize("template", [MARKED, MARKED.replace("]\n", "] ")])
def test_marked_templates_give_the_mask_of_transformers(tokenizer, template):
    """Also where a token lies across the edge of a turn."""
    tokens, mask = ChatEncoder(tokenizer, template).encode(TALK)
    tokenizer.backend_tokenizer.encode_special_tokens = False
    theirs = tokenizer.apply_chat_template(
        TALK, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokens.tolist() == theirs["input_ids"]
    assert mask.astype(int).tolist() == theirs["assistant_masks"]


def test_what_cannot_be_trained_is_named(tokenizer):
    encoder = ChatEncoder(tokenizer, TEMPLATE)
    with pytest.raises(BadRow, match="no assistant"):
        encoder.encode(TALK[:2])
    with pytest.raises(BadRow, match="special token in a message"):
        encoder.encode([*TALK, {"role": "user", "content": "stop<|end_of_text|>"}])


CALL = [{"type": "function", "function": {"name": "multiply", "arguments": {"a": 3}}}]
CALLS = (
    "{% if tools %}[tools]{{ tools | tojson }}\n{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{{ m.reasoning_content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.a }})"
    "{% endfor %}{{ m.content }}\n{% endfor %}"
)
CALLED = [
    {"role": "user", "content": "3*4?"},
    {"role": "assistant", "content": "", "tool_calls": CALL, "reasoning_content": "Ask."},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "12."},
]


def test_a_template_gets_what_it_names_of_a_message(tokenizer):
    encoder = ChatEncoder(tokenizer, CALLS)
    tokens, mask = encoder.encode([{**message, "id": 7} for message in CALLED], [{"name": "multiply"}])
    text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert text == '[tools][{"name": "multiply"}]\n[user]3*4?\n[assistant]Ask.multiply(3)\n[tool]12\n[assistant]12.\n'
    assert "multiply(3)" in tokenizer.decode(tokens[mask], clean_up_tokenization_spaces=False)
    assert encoder.unused == {"id": 1}


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        (CALLED, None, "reasoning_content of a message, which the chat template does not use"),
        ([{**CALLED[1], "reasoning_content": None}], None, "tool_calls of a message, which the chat template does not"),
        (TALK, [{"name": "multiply"}], "tools, which the chat template does not use"),
        ([{**TALK[2], "weight": 0.5}], None, "weight of a message, which is neither 0 nor 1"),
        ([*TALK, {"role": "user", "content": "", "x": ["<|end_of_text|>"]}], None, "special token in a message"),
        ([{"role": "assistant", "content": "", "value": "Ho"}], None, "a message without content, whose fields the"),
    ],
)
def test_what_a_template_would_drop_is_named(tokenizer, messages, tools, reason):
    messages = [{key: field for key, field in message.items() if field is not None} for message in messages]
    with pytest.raises(BadRow, match=f"^{reason}"):
        ChatEncoder(tokenizer, TEMPLATE).encode(messages, tools)


@pytest.mark.parametrize("mark", [("", ""), ("{% generation %}", "{% endgeneration %}")])
@pytest.mark.parametrize("role", ["tool", "bot", "system"])
def test_a_message_that_the_template_leaves_out_is_named(tokenizer, role, mark):
    """Templates of two roles, and those that write the system's prompt at the beginning alone."""
    begin, end = mark
    template = (
        "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and loop.first) %}[{{ m.content }}]\n"
        f"{{% elif m.role == 'assistant' %}}{begin}{{{{ m.content }}}}\n{end}{{% endif %}}{{% endfor %}}"
    )
    encoder = ChatEncoder(tokenizer, template)
    encoder.encode(TALK)
    with pytest.raises(BadRow, match=r"^a message that the chat template leaves out$") as error:
        encoder.encode([*TALK, {"role": role, "content": "it"}, TALK[4]])
    assert error.value.detail == f"role {role}"


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_a_message_of_weight_0_is_not_trained(tokenizer, template):
    weighted = [*TALK[:2], {**TALK[2], "weight": 0}, TALK[3], {**TALK[4], "weight": 1}]
    tokens, mask = ChatEncoder(tokenizer, template).encode(weighted)
    assert tokens.tolist() == ChatEncoder(tokenizer, template).encode(TALK)[0].tolist()
    assert tokenizer.decode(tokens[mask], clean_up_tokenization_spaces=False) == "Gone.<|end_of_text|>\n"


def test_a_conversation_that_the_template_refuses_is_counted(fixture_tokenizer, tmp_path):
    """Nothing else of the preparation stops; the first is named."""
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('Roles must alternate') }}{% endif %}" + TEMPLATE
    (tmp_path / "t.jinja").write_text(strict)
    rows = [{"messages": TALK[1:]}, {"messages": TALK}, {"messages": TALK}, {"messages": TALK[1:3]}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = CorpusConfig(
        name="c", sources=[SourceConfig("chat", str(tmp_path / "chat.jsonl"), chat=True)],
        tokenizer=str(fixture_tokenizer), chat_template=str(tmp_path / "t.jinja"),
    )  # fmt: skip
    lines: list[str] = []
    output = prepare(PrepareConfig(str(tmp_path / "o"), [128], workers=1, corpus=corpus), lines.append)
    (source,) = PackedStore(output / "packed-128").sources
    reason = "refused by the chat template"
    assert (source["documents"], source["skipped"]) == (2, {reason: 2})
    assert f"chat.jsonl: first skipped as {reason!r}: chat.jsonl:2 (Roles must alternate)" in lines
    corpus.bad_rows = "error"
    with pytest.raises(ValueError, match=r"chat.jsonl:2 \(Roles must alternate\): refused by the chat template; corr"):
        prepare(PrepareConfig(str(tmp_path / "e"), [128], workers=1, corpus=corpus), lines.append)
    (tmp_path / "t.jinja").write_bytes(b"\xef\xbb\xbf" + TEMPLATE.encode())
    assert read_template(str(tmp_path / "t.jinja")) == TEMPLATE
    (tmp_path / "t.jinja").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"corpus.chat_template=.*t.jinja cannot be read .*; save it as UTF-8"):
        read_template(str(tmp_path / "t.jinja"))
    with pytest.raises(ValueError, match=r"line 1 of the chat template has a syntax error"):
        ChatEncoder(load_tokenizer(str(fixture_tokenizer)).tokenizer, "{% for m in messages %}")


def test_the_template_of_the_docs_trains_the_answers_to_their_end(tokenizer):
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    template = page.partition("```jinja\n")[2].partition("\n```")[0]
    talk = [{"role": "user", "content": "Is it far?"}, {"role": "assistant", "content": "No."}] * 2
    tokens, mask = ChatEncoder(tokenizer, template).encode(talk)
    end = tokenizer.eos_token
    assert tokenizer.decode(tokens[mask]) == f"No.{end}No.{end}"
    prompt = tokenizer.apply_chat_template(talk[:1], chat_template=template, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(tokens).startswith(prompt + "No.")


def test_templates_that_cannot_be_used_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"has no chat template; set corpus.chat_template=FILE"):
        ChatEncoder(tokenizer)
    forgetful = "{% for m in messages[-2:] %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template changes earlier messages when one follows"):
        ChatEncoder(tokenizer, forgetful).encode(TALK)


DATED = """{{ bos_token }}{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}Today Date: {{ date_string }}, {{ strftime_now( '%Y-%m-%d' ) }}
"""


class OneDay(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2025, 3, 9, 17, 30)


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_a_template_gets_the_date_that_is_set(tokenizer, template, monkeypatch):
    """Llama 3's way of asking. Whatever day it is: the tokens of transformers on the day that is set."""
    ours, _ = ChatEncoder(tokenizer, DATED + template, date(2025, 3, 9)).encode(TALK)
    assert "Today Date: 09 Mar 2025, 2025-03-09\n" in tokenizer.decode(ours, clean_up_tokenization_spaces=False)
    monkeypatch.setattr(chat_template_utils, "datetime", OneDay)
    tokenizer.backend_tokenizer.encode_special_tokens = False
    theirs = tokenizer.apply_chat_template(TALK, chat_template=DATED + template, return_dict=True)
    assert ours.tolist() == theirs["input_ids"]


def test_a_template_that_asks_for_the_date_and_gets_none_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"asks for today's date \(strftime_now\).*set corpus.chat_date=YYYY-MM-DD"):
        ChatEncoder(tokenizer, DATED + TEMPLATE)
    with pytest.raises(ValueError, match=r"would depend on the day; call it with a format in quotes"):
        ChatEncoder(tokenizer, "{% set f = '%Y' %}{{ strftime_now(f) }}" + TEMPLATE, date(2025, 3, 9))


def test_documents_keep_their_tokenizer(tokenizer, fixture_tokenizer):
    """In documents special tokens are text, also after a conversation was encoded with the same tokenizer."""
    encoder = load_tokenizer(str(fixture_tokenizer))
    before = encoder.encode_document("a<|end_of_text|>b").tolist()
    ChatEncoder(encoder.tokenizer, TEMPLATE).encode(TALK)
    assert encoder.encode_document("a<|end_of_text|>b").tolist() == before


def test_sources_become_domains(fixture_corpus, fixture_tokenizer, tmp_path):
    """Books cut whole and the rest dropped, code by repository, conversations with masks: each in its own domain."""
    encoder = load_tokenizer(str(fixture_tokenizer))
    (tmp_path / "code/a").mkdir(parents=True)
    (tmp_path / "code/a/x.py").write_text("x = 1\n")
    (tmp_path / "code/a/y.py").write_text("y = 2\n")
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(5)))
    (tmp_path / "template.jinja").write_text(DATED + TEMPLATE)
    corpus = CorpusConfig(
        name="mix",
        chat_date="2024-07-26",
        tokenizer=str(fixture_tokenizer),
        chat_template=str(tmp_path / "template.jinja"),
        eos=False,
        sources=[
            SourceConfig("books", str(fixture_corpus)),
            SourceConfig("code", str(tmp_path / "code"), "repositories"),
            SourceConfig("chat", str(tmp_path / "chat.jsonl"), chat=True),
        ],
        domains={"books": DomainConfig("long")},
    )
    config = PrepareConfig(str(tmp_path / "out"), [128], corpus=corpus)
    store = PackedStore(prepare(config, lambda line: None) / "packed-128")
    store.verify()
    books = [[0, *encoder.encode_texts([path.read_text()])[0]] for path in sorted(fixture_corpus.iterdir())]
    whole = sum(len(tokens) // 128 for tokens in books)
    info, account = store.domains["books"], store.accounting["books"]
    assert (info.sequences, info.padding) == (whole, 0)
    assert account["tokens_in"] == sum(map(len, books)) == info.tokens + sum(account["dropped"].values())
    assert account["dropped"]["remainder"] == sum(len(tokens) % 128 for tokens in books if len(tokens) >= 128)
    code = store.read("code", 0)
    assert code.tokens[: code.ends[0]].tolist() == [0, *encoder.encode_texts(["# a/x.py\nx = 1\n# a/y.py\ny = 2\n"])[0]]
    tokens, mask = ChatEncoder(encoder.tokenizer, DATED + TEMPLATE, date(2024, 7, 26)).encode(TALK)
    first = store.read("chat", 0)
    found = first.tokens[: len(tokens)].tolist(), first.loss_mask[: len(tokens)].tolist()
    assert found == (tokens.tolist(), mask.tolist())
    assert store.domains["chat"].trained_tokens == 5 * mask.sum()
    assert [source["name"] for source in store.sources] == [fixture_corpus.name, "code", "chat.jsonl"]
    assert [source["documents"] for source in store.sources] == [len(books), 1, 5]
    assert [source.get("chat_date") for source in store.sources] == [None, None, "2024-07-26"]
    assert not (tmp_path / "out/work").exists()
