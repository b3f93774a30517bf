"""Tokenizer directories: described, hashed, copied, compared."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from ropewalk.data.store.hashing import canonical_json, files_signature, sha256_directory, sha256_text
from ropewalk.errors import UserError
from ropewalk.files import sha256_of

RANKS = "tokenizer.model"  # Llama 3's file: a token in base64 and its rank on each line
# transformers' classes for a tokenizer.json that is used as it is
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
PLAIN_FILES = ("chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")


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
    content = json.loads(config.read_text(encoding="utf-8"))
    if content.get("tokenizer_class") not in PLAIN_CLASSES or not {"bos_token", "eos_token"} <= content.keys():
        return False
    # transformers would add those that tokenizer.json lacks
    added = [
        json.dumps(token["content"], ensure_ascii=False) for token in content.get("added_tokens_decoder", {}).values()
    ]
    text = (directory / "tokenizer.json").read_text(encoding="utf-8") if added else ""
    return all(token in text for token in added)


def copy_plain(source: Path, target: Path) -> None:
    """Copy the files of a plain tokenizer, and nothing that may lie beside them."""
    target.mkdir(parents=True, exist_ok=True)
    for path in _plain_files(source):
        shutil.copyfile(path, target / path.name)


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
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    return {
        "sha256": sha256_directory(directory),
        "vocab_size": max(vocab.values()) + 1,
        "bos_id": vocab.get(token_text(config.get("bos_token"))),
        "eos_id": vocab.get(token_text(config.get("eos_token"))),
    }


@cache
def saved_backend(signature: object, directory: Path) -> Any:
    """tokenizer.json as ``tokenizers`` opens it, once a process: the file of a large vocabulary is large."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def check_same_vocabulary(store: Path, model: Path) -> None:
    """Compare the tokens and ids of two tokenizer directories, however their files are written.

    Special tokens are left out: Llama 3.1 gave names to some that Llama 3 held in reserve.

    Raises:
        UserError: where they differ.
    """
    from tokenizers import Tokenizer

    of_store, of_model = (
        Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab(with_added_tokens=False) for path in (store, model)
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
    return token["content"] if isinstance(token, dict) else token
