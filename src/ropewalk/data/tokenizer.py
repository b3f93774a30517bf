"""Tokenizers: train a byte-level BPE, open any Hugging Face one, and encode documents with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.hashing import sha256_directory

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
BATCH_CHARACTERS = 4_000_000  # encoded at once; an encoding takes about a hundred bytes of memory per token


class DocumentEncoder:
    """Turns documents into ``[bos] tokens [eos]`` with a fast Hugging Face tokenizer.

    Text that looks like a special token is encoded as the text it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Wrap ``tokenizer``, a transformers fast tokenizer.

        Raises:
            ValueError: for a slow tokenizer, or one with neither a BOS nor an EOS token.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json); convert it first")
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError(
                f"{tokenizer.name_or_path} has neither a BOS nor an EOS token to separate documents; set one"
            )
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True
        self._head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._tail = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, without special tokens."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_document(self, text: str) -> NDArray[np.uint32]:
        """``[bos] tokens [eos]``, uint32."""
        return self._wrapped(self.encode_texts([text]))

    def encode_documents(self, documents: Sequence[Sequence[str]]) -> list[NDArray[np.uint32]]:
        """``[bos] tokens [eos]`` of each document, uint32; a document is given as its parts.

        Parts are encoded apart, which lets one large document use all cores.
        """
        parts = [part for document in documents for part in document]
        encoded = chain.from_iterable(map(self._encode_arrays, _batches(parts)))
        return [self._wrapped([next(encoded) for _ in document]) for document in documents]

    def save(self, directory: Path) -> None:
        """Write the tokenizer so that AutoTokenizer loads it."""
        self._tokenizer.save_pretrained(directory)

    def _encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.array(ids, dtype=np.uint32) for ids in self.encode_texts(texts)]

    def _wrapped(self, parts: Iterable[Any]) -> NDArray[np.uint32]:
        pieces = [self._head, *parts, self._tail]
        return np.concatenate([np.asarray(piece, dtype=np.uint32) for piece in pieces])


def _batches(texts: Sequence[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def load_tokenizer(name: str) -> DocumentEncoder:
    """Open the tokenizer of a Hugging Face directory or hub id.

    Raises:
        ValueError: where there is none, or documents cannot be separated with it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"corpus.tokenizer={name} cannot be opened: {reason}; name a tokenizer directory or a hub id"
        ) from error
    return DocumentEncoder(tokenizer)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> DocumentEncoder:
    """Train a byte-level BPE; the same texts in the same order give the same tokenizer.

    Every digit is a token of its own, and the stock loader prepends BOS, as Llama 3's does.

    Args:
        texts: what is counted.
        vocab_size: entries, the 256 bytes and the two special tokens included.

    Raises:
        ValueError: for a vocabulary that has no room for the bytes and special tokens, or texts that are too
            few to fill it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"corpus.vocab_size={vocab_size} must be at least {len(alphabet) + 2}; raise it")
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"the corpus gives a tokenizer of {tokenizer.get_vocab_size()} entries, fewer than "
            f"corpus.vocab_size={vocab_size}; lower it or add text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return DocumentEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS))


def describe_tokenizer(directory: Path) -> dict[str, Any]:
    """``sha256`` of the directory, ``vocab_size`` (largest id + 1), ``bos_id`` and ``eos_id`` (or None).

    Raises:
        ValueError: for a directory without tokenizer.json and tokenizer_config.json.
    """
    from tokenizers import Tokenizer

    paths = directory / "tokenizer.json", directory / "tokenizer_config.json"
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{directory} has no {path.name}; give a directory that save_pretrained() wrote")
    tokenizer = Tokenizer.from_file(str(paths[0]))
    config = json.loads(paths[1].read_text(encoding="utf-8"))
    return {
        "sha256": sha256_directory(directory),
        "vocab_size": max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        "bos_id": _token_id(tokenizer, config.get("bos_token")),
        "eos_id": _token_id(tokenizer, config.get("eos_token")),
    }


def _token_id(tokenizer: Any, token: str | dict[str, Any] | None) -> int | None:
    """The id of a special token as tokenizer_config.json writes it: its text, or an object with its text."""
    text = token["content"] if isinstance(token, dict) else token
    return None if text is None else tokenizer.token_to_id(text)
