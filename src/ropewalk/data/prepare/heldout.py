"""Long documents kept out of training: chosen before the tokenizer is trained, written for evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.prepare.corpus import Document
from ropewalk.data.prepare.tokenizer import DocumentEncoder
from ropewalk.data.store.hashing import stable_key
from ropewalk.errors import UserError
from ropewalk.files import fsync_path, sha256_of, write_atomically

PREFERRED_TOKENS = 65_536  # longer documents are taken last: training needs them most
BYTES_PER_TOKEN = 4  # for guessing which documents are long enough; counted afterwards

EncoderFactory = Callable[[Collection[int]], DocumentEncoder]


def choose_heldout(
    documents: Sequence[Document], count: int, length: int, make_encoder: EncoderFactory
) -> tuple[DocumentEncoder, dict[int, NDArray[np.uint32]]]:
    """The tokenizer, and ``count`` documents of at least ``length`` tokens that had no part in it.

    The tokenizer is needed to count tokens and must not see what it counts, so documents of a likely size
    are set aside first, in the order of a stable hash of their names; where too few prove long enough, more
    are set aside and the tokenizer is made again.

    Args:
        documents: the corpus.
        count: documents to hold out.
        length: tokens that each has at least, BOS and EOS included.
        make_encoder: makes the tokenizer without the documents of the given indices.

    Returns:
        The tokenizer, and index -> tokens of the documents held out.

    Raises:
        UserError: where the corpus has too few such documents.
    """
    if count == 0:
        return make_encoder(()), {}
    candidates = sorted(
        (index for index, document in enumerate(documents) if document.bytes >= length),
        key=lambda index: _preference(documents[index], length),
    )
    limit = min(len(candidates), len(documents) - 1)  # something must be left to train on
    aside = min(count, limit)
    while True:
        encoder = make_encoder(candidates[:aside])
        encoded = encoder.encode_documents([documents[index].parts for index in candidates[:aside]])
        enough = {i: tokens for i, tokens in zip(candidates, encoded, strict=False) if len(tokens) >= length}
        if len(enough) >= count:
            return encoder, dict(list(enough.items())[:count])
        if aside == limit:
            raise UserError(
                f"corpus.heldout_documents={count}, but of the {limit} documents that could be set aside "
                f"only {len(enough)} have corpus.heldout_length={length} tokens; lower one or add documents"
            )
        aside = min(2 * aside, limit)


def _preference(document: Document, length: int) -> tuple[bool, int]:
    likely = BYTES_PER_TOKEN * length <= document.bytes < BYTES_PER_TOKEN * PREFERRED_TOKENS
    return not likely, stable_key("heldout", document.name)


def write_heldout(directory: Path, documents: Sequence[Document], tokens: Sequence[int], tokenizer_sha256: str) -> None:
    """Write ``documents.jsonl`` (name, text) and, last, ``manifest.json`` with counts and the file's SHA-256.

    Args:
        directory: made if needed.
        documents: what was held out.
        tokens: of each document, BOS and EOS included.
        tokenizer_sha256: of the tokenizer that counted them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "documents.jsonl"
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            file.write(json.dumps({"name": document.name, "text": document.text}, ensure_ascii=False) + "\n")
    fsync_path(path)
    manifest = {
        "format": "ropewalk-heldout",
        "version": 1,
        "sha256": sha256_of(path),
        "tokenizer_sha256": tokenizer_sha256,
        "documents": [
            {"name": document.name, "bytes": document.bytes, "tokens": count}
            for document, count in zip(documents, tokens, strict=True)
        ],
    }
    write_atomically(directory / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
