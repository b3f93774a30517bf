"""Tokenizers: train a byte-level BPE, open any Hugging Face one, and encode documents with it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.prepare.corpus import Document
from ropewalk.data.prepare.engines import BOS, EOS, PROBE, CheckedEngine, open_engine, reference_of
from ropewalk.data.store.tokenizer_files import adds_bos, adds_eos, bos_mode, open_tokenizer, set_bos
from ropewalk.errors import UserError

BATCH_CHARACTERS = 4_000_000  # encoded at once; an encoding takes about a hundred bytes of memory per token


class TokenizersEngine:
    """Hugging Face's tokenizers: every tokenizer.json."""

    name = "tokenizers"

    def __init__(self, backend: Any) -> None:
        """Take a ``tokenizers.Tokenizer``; from now on it encodes special tokens as text."""
        self._backend = backend
        self._backend.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        """See Engine."""
        encodings = self._backend.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


class DocumentEncoder:
    """Turns documents into ``[bos] tokens [eos]`` with a fast Hugging Face tokenizer.

    Text that looks like a special token is encoded as the text it is.

    Attributes:
        tokenizer: the transformers tokenizer.
        engine: what encodes.
        head: BOS, or nothing; uint32 (0 or 1,).
        tail: EOS, or nothing; uint32 (0 or 1,).
    """

    def __init__(
        self, tokenizer: Any, engine: str = "auto", directory: Path | None = None, bos: str = "auto", eos: bool = True
    ) -> None:
        """Wrap ``tokenizer``, a transformers fast tokenizer.

        Args:
            tokenizer: taken over: its backend encodes special tokens as text from now on.
            engine: see engines.open_engine.
            directory: of the tokenizer, where it is one.
            bos: begin documents with BOS: auto (where the tokenizer's own encode does), always or never.
            eos: end them with EOS, where the tokenizer has one.

        Raises:
            UserError: for a slow tokenizer, one with nothing that separates documents, no BOS with bos=always, or an
                engine that cannot be used.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json); convert it first")
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UserError(
                f"{tokenizer.name_or_path} has neither a BOS nor an EOS token to separate documents; set one"
            )
        self.tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        self.engine = open_engine(engine, TokenizersEngine(backend), backend, directory)
        mode = bos_mode(bos)
        begins = mode == "always" or (mode == "auto" and adds_bos(tokenizer))
        if begins and tokenizer.bos_token_id is None:
            raise UserError(f"corpus.bos=always, but {tokenizer.name_or_path} has no BOS token; set corpus.bos=auto")
        if mode == "auto" and eos and not begins and tokenizer.eos_token_id is None:
            raise UserError(
                f"{tokenizer.name_or_path} has no EOS token and puts no BOS before a text, so nothing separates "
                "documents; set corpus.bos=always"
            )
        ids = tokenizer.bos_token_id if begins else None, tokenizer.eos_token_id if eos else None
        self.head, self.tail = (np.array([] if id_ is None else [id_], dtype=np.uint32) for id_ in ids)
        self._cuts_at_lines = self._tokens_end_at_lines()

    def encode_texts(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The tokens of each text, uint32, without special tokens."""
        return self.engine.encode_batch([text.encode() for text in texts])

    def pieces(self, part: str) -> Iterator[str]:
        """``part`` in pieces of a few megabytes, cut where no token crosses, if the tokenizer has such places."""
        if not self._cuts_at_lines:
            yield part
            return
        while len(part) > BATCH_CHARACTERS:
            position = _line_start(part, BATCH_CHARACTERS)
            if position == 0:
                break
            yield part[:position]
            part = part[position:]
        yield part

    def _tokens_end_at_lines(self) -> bool:
        """True if text between newlines can be encoded apart; if a space is put before each text, it cannot."""
        whole = np.concatenate(self.encode_texts([PROBE]))
        pieces, rest = [], PROBE
        while position := _line_start(rest, 1, forward=True):
            pieces.append(rest[:position])
            rest = rest[position:]
        return np.array_equal(whole, np.concatenate(self.encode_texts([*pieces, rest])))

    def encode_document(self, text: str) -> NDArray[np.uint32]:
        """``[bos] tokens [eos]``, uint32."""
        return self._wrapped(self.encode_texts([text]))

    def encode_documents(self, documents: Sequence[Sequence[str]]) -> list[NDArray[np.uint32]]:
        """``[bos] tokens [eos]`` of each document, uint32; a document is given as its parts.

        Parts are encoded apart, which lets one large document use all cores.
        """
        parts = [part for document in documents for part in document]
        encoded = chain.from_iterable(map(self.encode_texts, batches(parts)))
        return [self._wrapped([next(encoded) for _ in document]) for document in documents]

    def unchecked(self) -> DocumentEncoder:
        """The same encoder; where its engine is one that must be checked, with what it is checked against."""
        plain = copy.copy(self)
        plain.engine = reference_of(self.engine)
        return plain

    def save(self, directory: Path) -> None:
        """Write the tokenizer so that AutoTokenizer loads it, and its own encode begins as these documents do."""
        self.tokenizer.save_pretrained(directory)
        self.mark(directory)

    def mark(self, directory: Path) -> None:
        """Have the tokenizer in ``directory``, a copy of this one, begin a text as documents do, and end none."""
        if adds_bos(self.tokenizer) != bool(len(self.head)) or adds_eos(self.tokenizer):
            set_bos(directory, bool(len(self.head)))

    def _wrapped(self, parts: Iterable[Any]) -> NDArray[np.uint32]:
        pieces = [self.head, *parts, self.tail]
        return np.concatenate([np.asarray(piece, dtype=np.uint32) for piece in pieces])


def _line_start(text: str, near: int, forward: bool = False) -> int:
    """A place before (or after) ``near`` where a line starts and neither side of its newline is a space; 0: none."""
    while True:
        position = text.find("\n", near) if forward else text.rfind("\n", 0, near)
        if position <= 0 or position + 1 >= len(text):
            return 0
        if not text[position - 1].isspace() and not text[position + 1].isspace():
            return position + 1
        near = position + 1 if forward else position


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """``texts`` in lists of a few megabytes."""
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


def encoded_documents(documents: Iterator[Document], encoder: DocumentEncoder) -> Iterator[tuple[Any, bool]]:
    """The tokens of documents, a stretch at a time, and whether the document ends with it.

    A few megabytes of text are encoded at once, and no document need be in memory as tokens.

    Raises:
        FastPathError: where the engine is a checked one, and it differs from its reference.
    """
    checked = encoder.engine if isinstance(encoder.engine, CheckedEngine) else None
    last: list[bool] = []  # of each piece under way: whether its document ends with it
    watched: list[bool] = []  # of each piece that is not encoded yet: whether its tokens are to be compared

    def pieces() -> Iterator[str]:
        for position, document in enumerate(documents):
            watch = checked is not None and checked.watch(document.parts, position == 0)
            for part in document.parts:
                for piece in encoder.pieces(part):
                    last.append(False)
                    watched.append(watch)
                    yield piece
            last[-1] = True

    # A batch may end within a document whose last piece is not known yet, so each waits for the next one to begin.
    held: list[Any] = []
    begins = True
    for batch in batches(pieces()):
        encoded = encoder.encode_texts(batch)
        if checked is not None:
            for text, tokens, watch in zip(batch, encoded, watched, strict=True):
                if watch:
                    checked.compare(text.encode(), tokens)
        watched.clear()
        held += encoded
        ready = len(held) - 1
        for tokens, ends in zip(held[:ready], last[:ready], strict=True):
            yield _framed(encoder, tokens, begins, ends), ends
            begins = ends
        del held[:ready], last[:ready]
    for tokens in held:
        yield _framed(encoder, tokens, begins, True), True


def _framed(encoder: DocumentEncoder, tokens: Any, begins: bool, ends: bool) -> Any:
    """A stretch of a document with what begins and ends one; most are neither, and are not copied."""
    if not begins and not ends:
        return tokens
    return np.concatenate([encoder.head if begins else tokens[:0], tokens, encoder.tail if ends else tokens[:0]])


def load_tokenizer(
    name: str | Path,
    engine: str = "auto",
    bos: str = "auto",
    eos: bool = True,
    *,
    ranks: Path | None = None,
    saved: bool = False,
) -> DocumentEncoder:
    """The encoder of a Hugging Face directory or hub id; see DocumentEncoder and open_tokenizer.

    Args:
        name: directory or hub id.
        engine: see engines.open_engine.
        bos: see DocumentEncoder.
        eos: end documents with EOS.
        ranks: directory of its tokenizer.model; None: the same.
        saved: see open_tokenizer.

    Raises:
        UserError: see the two.
    """
    directory = ranks or (Path(name) if Path(name).is_dir() else None)
    return DocumentEncoder(open_tokenizer(name, "corpus.tokenizer", saved=saved), engine, directory, bos, eos)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> DocumentEncoder:
    """Train a byte-level BPE; the same texts in the same order give the same tokenizer.

    Every digit is a token of its own, and the stock loader prepends BOS, as Llama 3's does.

    Args:
        texts: what is counted.
        vocab_size: entries, the 256 bytes and the two special tokens included.

    Raises:
        UserError: for a vocabulary that has no room for the bytes and special tokens, or texts that are too
            few to fill it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 2:
        raise UserError(f"corpus.vocab_size={vocab_size} must be at least {len(alphabet) + 2}; raise it")
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f"the corpus gives a tokenizer of {tokenizer.get_vocab_size()} entries, fewer than "
            f"corpus.vocab_size={vocab_size}; lower it or add text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return DocumentEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS))
