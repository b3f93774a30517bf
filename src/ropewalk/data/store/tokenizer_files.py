"""Tokenizers: opened so that their tokens carry the text, described, hashed, copied, compared."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ropewalk.data.store.hashing import canonical_json, files_signature, sha256_directory, sha256_text
from ropewalk.errors import UserError, warn_once
from ropewalk.files import fsync_path, sha256_of

RANKS = "tokenizer.model"  # Llama 3's file: a token in base64 and its rank on each line
# transformers' classes for a tokenizer.json that is used as it is
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
TEMPLATE_FILE = "chat_template.jinja"
TOKENS_FILE = "special_tokens_map.json"
PLAIN_FILES = (TEMPLATE_FILE, TOKENS_FILE, "tokenizer.json", "tokenizer_config.json")
BOS_MODES = ("auto", "always", "never")
SENTENCE = "The quick brown fox jumps over 1234567890 lazy dogs; isn't that so?"
LOST_OF_SENTENCE = 0.2  # largest share of characters that may not come back from the tokens of SENTENCE
LOST_OF_TEXT = 0.01  # of a corpus
_STATES = {"truncation": "no_truncation", "padding": "no_padding"}


@dataclass(frozen=True)
class SavedTokenizer:
    """A tokenizer on disk as an encoder of documents needs it, without the seconds that transformers takes to load."""

    backend_tokenizer: Any
    bos_token_id: int | None
    eos_token_id: int | None
    name_or_path: str
    is_fast: bool = True


def open_tokenizer(name: str | Path, key: str = "tokenizer", *, saved: bool = False) -> Any:
    """The transformers tokenizer of a directory or hub id, opened the one way that this project knows.

    What an earlier use left in its file is switched off, see without_state, and its tokens carry the text, see
    check_carries. Give every encode ``add_special_tokens``, or use encode below.

    Args:
        name: directory or hub id.
        key: what names it in the configuration, for messages.
        saved: a directory that save_pretrained() wrote is opened as a SavedTokenizer, once a process.

    Raises:
        UserError: nothing that transformers reads, or tokens that do not carry the text.
    """
    if saved:
        tokenizer = _saved_tokenizer(Path(name))
        check_carries(tokenizer.backend_tokenizer, [SENTENCE], f"{key}={name}", LOST_OF_SENTENCE)
        return tokenizer
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds for a file that they cannot read
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{key}={name} cannot be opened: {reason}; name a directory with tokenizer.json and tokenizer_config.json, "
            "or a hub id"
        ) from error
    if tokenizer.is_fast:
        without_state(tokenizer.backend_tokenizer, str(name))
        check_carries(tokenizer.backend_tokenizer, [SENTENCE], f"{key}={name}", LOST_OF_SENTENCE)
        if adds_eos(tokenizer):
            warn_once(f"{name} puts EOS after every text; no prompt here ends with it")
    return tokenizer


def without_state(backend: Any, name: str) -> None:
    """Switch off truncation, padding and BPE dropout saved in a tokenizer.json, with a warning on stderr.

    Args:
        backend: a ``tokenizers.Tokenizer``; changed.
        name: of the tokenizer, for the warning.
    """
    states = [state for state in _STATES if getattr(backend, state) is not None]
    for state in states:
        getattr(backend, _STATES[state])()
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
        states.append("dropout")
    if states:
        warn_once(f"{name} has {', '.join(states)} in tokenizer.json; switched off")


def check_carries(backend: Any, texts: Iterable[str], name: str, limit: float = LOST_OF_TEXT) -> None:
    """Decode the tokens of texts and compare their characters, up to the tokenizer's own normalizer and white space.

    Args:
        backend: a ``tokenizers.Tokenizer``.
        texts: some text.
        name: of the tokenizer, for the message.
        limit: largest share of characters that may be lost.

    Raises:
        UserError: more are lost, as by a vocabulary that is not there or is of another language.
    """
    unknown = getattr(backend.model, "unk_token", None)
    unknown_id = None if unknown is None else backend.token_to_id(unknown)
    expected, lost = 0, Counter[str]()
    for text in texts:
        ids = backend.encode(text, add_special_tokens=False).ids
        decoded = backend.decode([id_ for id_ in ids if id_ != unknown_id], skip_special_tokens=False)
        normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        wanted = Counter(normal)
        characters = Counter({character: count for character, count in wanted.items() if not character.isspace()})
        expected += characters.total()
        lost += characters - Counter(decoded)
    if lost.total() > limit * expected:
        examples = " ".join(character for character, _ in lost.most_common(8))
        raise UserError(
            f"{name} loses {lost.total() / expected:.1%} of the characters between text and tokens (limit {limit:.0%}; "
            f"lost: {examples}), with {backend.get_vocab_size():,} entries; name the tokenizer of this language, with "
            "all of its files"
        )


def adds_bos(tokenizer: Any) -> bool:
    """True if the tokenizer's own encode begins with its BOS; many have a BOS that they never put before a text.

    Args:
        tokenizer: of transformers, fast, or a SavedTokenizer.
    """
    return tokenizer.bos_token_id is not None and _own_ids(tokenizer)[:1] == [tokenizer.bos_token_id]


def adds_eos(tokenizer: Any) -> bool:
    """True if the tokenizer's own encode ends with its EOS, which no prompt may."""
    return tokenizer.eos_token_id is not None and _own_ids(tokenizer)[-1:] == [tokenizer.eos_token_id]


def _own_ids(tokenizer: Any) -> list[int]:
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    return tokenizer.encode("a", add_special_tokens=True)


def encode(tokenizer: Any, text: str, *, bos: bool) -> list[int]:
    """Tokens of ``text``, after BOS if asked and there is one; nothing at its end, whatever the tokenizer would add.

    Args:
        tokenizer: of transformers.
        text: special tokens in it are encoded as such.
        bos: begin with BOS; see adds_bos for the tokenizer's own way.
    """
    begin = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    return begin + tokenizer.encode(text, add_special_tokens=False, verbose=False)


def bos_mode(bos: str | bool) -> str:
    """``corpus.bos`` as one of BOS_MODES; true and false, its older form, are always and never.

    Raises:
        UserError: for anything else.
    """
    mode = {"true": "always", "false": "never"}.get(str(bos).lower(), str(bos))
    if mode not in BOS_MODES:
        raise UserError(f"corpus.bos={bos} is not known; use one of: {', '.join(BOS_MODES)}")
    return mode


def has_ranks(directory: Path) -> bool:
    """True if ``directory`` has Llama 3's tokenizer.model; Llama 2's, of that name too, is of another form."""
    path = directory / RANKS
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.read(1000).split(b"\n")[0].split()
    return len(first) == 2 and first[1].isdigit()


def is_plain(directory: Path) -> bool:
    """True if transformers would do no more than load tokenizer.json, so that it need not be loaded for it."""
    config = directory / "tokenizer_config.json"
    if not config.is_file() or not (directory / "tokenizer.json").is_file():
        return False
    try:
        content = _settings(directory)
    except ValueError:  # as a file that git-lfs has not fetched: transformers says what is wrong with it
        return False
    if not isinstance(content, dict) or content.get("tokenizer_class") not in PLAIN_CLASSES:
        return False
    if not {"bos_token", "eos_token"} <= content.keys():
        return False
    if {"add_bos_token", "add_eos_token"} & content.keys():
        return False
    # transformers would add those that tokenizer.json lacks, and names what is not a token
    ends = [content[name] for name in ("bos_token", "eos_token") if content[name] is not None]
    added = content.get("added_tokens_decoder") or {}
    tokens = [token_text(token) for token in (*(added.values() if isinstance(added, dict) else [None]), *ends)]
    text = (directory / "tokenizer.json").read_text(encoding="utf-8") if tokens else ""
    return all(isinstance(token, str) and json.dumps(token, ensure_ascii=False) in text for token in tokens)


def _settings(directory: Path) -> Any:
    """tokenizer_config.json, with the BOS and EOS of special_tokens_map.json where they win in transformers."""
    content = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    older = directory / TOKENS_FILE
    if not isinstance(content, dict) or "added_tokens_decoder" in content or not older.is_file():
        return content
    tokens = json.loads(older.read_text(encoding="utf-8"))
    names = ("bos_token", "eos_token")
    return {**content, **{name: tokens[name] for name in names if name in tokens}}


def begin_with(backend: Any, token: str | None) -> None:
    """Have a ``tokenizers.Tokenizer``'s own encode put ``token`` (None: nothing) before a text, and nothing after."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{token}:0 $A:0" if token else "$A:0",
        pair=f"{token}:0 $A:0 {token}:1 $B:1" if token else "$A:0 $B:1",
        special_tokens=[(token, backend.token_to_id(token))] if token else [],
    )


def set_bos(directory: Path, bos: bool) -> None:
    """Make the saved tokenizer's own encode begin with BOS, or not, in every library that reads the directory."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    begin_with(backend, token_text(_settings(directory).get("bos_token")) if bos else None)
    backend.save(str(directory / "tokenizer.json"))
    if {"add_bos_token", "add_eos_token"} & config.keys():
        config |= {"add_bos_token": bos, "add_eos_token": False}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    saved_backend.cache_clear()


def set_chat_template(directory: Path, template: str | None) -> None:
    """Give the saved tokenizer a chat template in place of its own, so that it is served as it was trained."""
    if template is None:
        return
    (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    if config.pop("chat_template", None) is not None:  # where older forms have it
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def copy_plain(source: Path, target: Path) -> None:
    """Copy the files of a plain tokenizer, without saved state, and nothing that may lie beside them."""
    saved_backend(files_signature(source), source)  # it can be opened
    target.mkdir(parents=True, exist_ok=True)
    for path in _plain_files(source):
        shutil.copyfile(path, target / path.name)
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    states = {state: None for state in _STATES if content.get(state) is not None}
    if states or content["model"].get("dropout") is not None:
        content |= states
        content["model"]["dropout"] = None
        (target / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Copy a tokenizer's files into a store and describe it; see describe_tokenizer."""
    description = describe_tokenizer(source)
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    for path in sorted(path for path in source.iterdir() if path.is_file()):
        fsync_path(Path(shutil.copyfile(path, target / path.name)))
    fsync_path(target)
    return description


def sha256_tokenizer(directory: Path) -> str:
    """SHA-256 over the names and contents of the files that a tokenizer consists of."""
    if not is_plain(directory):
        return sha256_directory(directory)
    files = [*_plain_files(directory), *([directory / RANKS] if has_ranks(directory) else [])]
    return sha256_text(canonical_json([[path.name, sha256_of(path)] for path in files]))


def _plain_files(directory: Path) -> list[Path]:
    return [directory / name for name in PLAIN_FILES if (directory / name).is_file()]


def describe_tokenizer(directory: Path) -> dict[str, Any]:
    """``sha256`` of the directory, ``vocab_size`` (largest id + 1), ``bos_id`` and ``eos_id`` (or None).

    Raises:
        UserError: for a directory without tokenizer.json and tokenizer_config.json.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise UserError(f"{directory} has no {name}; give a directory that save_pretrained() wrote")
    vocab = saved_backend(files_signature(directory), directory).get_vocab(with_added_tokens=True)
    config = _settings(directory)
    return {
        "sha256": sha256_directory(directory),
        "vocab_size": max(vocab.values()) + 1,
        "bos_id": vocab.get(token_text(config.get("bos_token"))),
        "eos_id": vocab.get(token_text(config.get("eos_token"))),
    }


def _saved_tokenizer(directory: Path) -> SavedTokenizer:
    backend = saved_backend(files_signature(directory), directory)
    config = _settings(directory)
    names = [token_text(config.get(name)) for name in ("bos_token", "eos_token")]
    bos_id, eos_id = (None if name is None else backend.token_to_id(name) for name in names)
    return SavedTokenizer(backend, bos_id, eos_id, str(directory))


@cache
def saved_backend(signature: object, directory: Path) -> Any:
    """tokenizer.json as ``tokenizers`` opens it, once a process: the file of a large vocabulary is large.

    Raises:
        UserError: for a file that it cannot open.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path} cannot be opened: {error}; fetch the tokenizer again") from error
    without_state(backend, str(directory))
    return backend


def check_same_vocabulary(store: Path, model: Path) -> None:
    """Compare the tokens and ids of two tokenizer directories, however their files are written.

    Special tokens are left out: Llama 3.1 gave names to some that Llama 3 held in reserve.

    Raises:
        UserError: where they differ.
    """
    of_store, of_model = (
        saved_backend(files_signature(path), path).get_vocab(with_added_tokens=False) for path in (store, model)
    )
    different = sorted(of_store.items() ^ of_model.items(), key=lambda entry: entry[1])
    if different:
        token, number = different[0]
        raise UserError(
            f"the tokenizer of the data ({store}) is not the model's ({model}): they differ first at id {number}, "
            f"token {token!r}; prepare the data with corpus.tokenizer={model}"
        )


def token_text(token: str | dict[str, Any] | None) -> str | None:
    """The text of a special token, which tokenizer_config.json writes as such or as an object that has it."""
    return token.get("content") if isinstance(token, dict) else token
