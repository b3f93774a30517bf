"""A tokenizer as GGUF metadata: byte-level BPE (Llama 3, Qwen, SmolLM, ours) and BPE over words (Llama 2, Gemma)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from ropewalk.data.store.tokenizer_files import open_tokenizer
from ropewalk.errors import UserError

# Pre-tokenizers by the pattern they split with, in llama.cpp's names. One name stands for pattern and merging: Llama 3
# looks a whole word up before it merges (``ignore_merges``), dbrx has its pattern without that.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"\p{N}" + _REST
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = "digit by digit"
_NAMES = {
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
}
_SPACE = "\u2581"


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Put the tokenizer of a Hugging Face directory into a GGUF file.

    Args:
        writer: of the file.
        directory: holds tokenizer.json.
        vocab_size: rows of the embedding; entries without a token are written as unused.

    Raises:
        UserError: for a tokenizer that llama.cpp would not follow.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{directory} has no tokenizer.json; save the tokenizer as a fast one, or export to=hf")
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{file} is {model.get('type')}; only BPE is written as GGUF: export to=hf")
    tokenizer = open_tokenizer(directory)
    tokens, types = _entries(content, vocab_size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(model, tokens))
        writer.add_add_space_prefix(_prepends_space(content))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(content))
        writer.add_token_merges([" ".join(_pair(merge)) for merge in model["merges"]])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, tokenizer)


def pre_tokenizer(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json.

    Raises:
        UserError: for one that it has no name for here; another's would split words elsewhere, silently.
    """
    patterns = tuple(_patterns(content.get("pre_tokenizer")))
    name = _NAMES.get((patterns, bool(content["model"].get("ignore_merges"))))
    if name is None or content.get("normalizer") not in (None, {"type": "NFC"}):
        raise UserError(
            f"the tokenizer splits text by {list(patterns)}, for which llama.cpp's name is not known here; "
            f"known are {', '.join(sorted(set(_NAMES.values())))}: export to=hf"
        )
    return name


def _patterns(step: Mapping[str, Any] | None) -> list[str]:
    if step is None:
        return ["none"]
    if step["type"] == "Sequence":
        return [pattern for part in step["pretokenizers"] for pattern in _patterns(part)]
    if step["type"] == "Digits" and step.get("individual_digits"):
        return [_DIGITS]
    if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
        return [_GPT2] if step.get("use_regex", True) else []
    if step["type"] == "Split":
        return [str(step["pattern"].get("Regex", step["pattern"]))]
    return [step["type"]]


def _entries(content: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id, 0 to vocab_size - 1."""
    kind = gguf.TokenType
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(kind.UNUSED)] * vocab_size
    for token, id_ in content["model"]["vocab"].items():
        is_byte = content["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[id_], types[id_] = token, int(kind.BYTE if is_byte else kind.NORMAL)
    for added in content["added_tokens"]:
        unknown = added["content"] == content["model"].get("unk_token")
        special = kind.UNKNOWN if unknown else kind.CONTROL
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(special if added["special"] else kind.USER_DEFINED)
    return tokens, types


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Scores under which llama.cpp, which joins the pair with the highest score first, follows the merges' order."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(model["merges"]):
        rank.setdefault("".join(_pair(merge)), i)
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _prepends_space(content: Mapping[str, Any]) -> bool:
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" and step.get("prepend") == _SPACE for step in steps)


def _add_special(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    add = {
        "bos_token_id": writer.add_bos_token_id,
        "eos_token_id": writer.add_eos_token_id,
        "unk_token_id": writer.add_unk_token_id,
        "pad_token_id": writer.add_pad_token_id,
    }
    for key, write in add.items():
        if getattr(tokenizer, key, None) is not None:
            write(getattr(tokenizer, key))
    written = tokenizer.encode("a")
    writer.add_add_bos_token(bool(written) and written[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(written) and written[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
