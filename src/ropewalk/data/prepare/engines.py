"""Faster engines than Hugging Face's tokenizers: tiktoken, and gigatoken, checked against a reference."""

from __future__ import annotations

import binascii
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from ropewalk.data.store.tokenizer_files import RANKS, has_ranks
from ropewalk.errors import UserError

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
ENGINES = ("auto", "tokenizers", "tiktoken", "gigatoken")
CHECKED_ONE_IN = 1000  # documents that gigatoken's tokens are compared of
LARGE_BYTES = 1_000_000  # of larger documents, a window is compared
WINDOW_BYTES = 65_536

PROBE = (
    "def probe(x):\n    return {'a': x[1:] + 12345678}  # naïve café — 東京 🙂\r\n\r\n\tIt's  the   END!!!\n\n\n"
    "x = 1\ny = [\n]\n\u0301\u200d  \u00a0 <|eot_id|></s><s>\n"
)


class Engine(Protocol):
    """Turns texts into tokens, nothing added."""

    name: str

    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        """The tokens of each text, uint32; texts are UTF-8, and what looks like a special token is text."""


class FastPathError(Exception):
    """gigatoken gave other tokens than its reference."""


class TiktokenEngine:
    """tiktoken, for a directory that has Llama 3's ``tokenizer.model`` beside its tokenizer.json."""

    name = "tiktoken"

    def __init__(self, directory: Path, backend: Any) -> None:
        """Open the ranks; the pattern that splits text into words is the one in tokenizer.json.

        Args:
            directory: that has tokenizer.model.
            backend: the ``tokenizers.Tokenizer``.

        Raises:
            UserError: where tiktoken is not installed, or there is no such file or pattern.
        """
        try:
            import tiktoken
        except ImportError as error:
            raise UserError("corpus.engine=tiktoken is not installed; pip install tiktoken") from error
        if not has_ranks(directory):
            raise UserError(
                f"{directory} has no {RANKS} of tiktoken's form; scripts/fetch_llama3_tokenizer.sh fetches one, or set "
                "corpus.engine=tokenizers"
            )
        pattern = _pattern(backend)
        ranks = read_ranks(directory / RANKS)
        self._encoding = tiktoken.Encoding(RANKS, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        """See Engine."""
        return [self._encoding.encode_to_numpy(text.decode()) for text in texts]


class GigatokenEngine:
    """gigatoken, many times faster than the others and younger: to be used through CheckedEngine."""

    name = "gigatoken"

    def __init__(self, backend: Any) -> None:
        """Take a ``tokenizers.Tokenizer``.

        Raises:
            UserError: where gigatoken is not installed, or does not know this kind of tokenizer.
        """
        try:
            from gigatoken import Tokenizer
        except ImportError as error:
            raise UserError("corpus.engine=gigatoken is not installed; pip install 'ropewalk[fast]'") from error
        plain = type(backend)(backend.model)  # without added tokens, so that what looks like a special token is text
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if getattr(backend, part) is not None:
                setattr(plain, part, getattr(backend, part))
        try:
            self._tokenizer = Tokenizer.from_json(plain.to_str())
        except Exception as error:  # whatever it raises, it says that it cannot take this tokenizer
            raise UserError(f"gigatoken cannot take this tokenizer ({error}); set corpus.engine=auto") from error

    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        """See Engine."""
        if not texts:
            return []
        rows = self._tokenizer.encode_batch(list(texts), parallel=False)
        if isinstance(rows, list):  # what it gives where awkward cannot be imported
            return [np.asarray(row, dtype=np.uint32) for row in rows]
        tokens = np.asarray(rows.layout.content.data, dtype=np.uint32)
        offsets = np.asarray(rows.layout.offsets.data)
        return [tokens[first:last] for first, last in pairwise(offsets)]


class CheckedEngine:
    """A fast engine, compared with a reference on a sample that the documents themselves choose.

    Compared are one document in 1,000 and the first of each shard, whole, and a window of 64 kB, at a random place, of
    each document above 1 MB. What is compared depends on the text of the documents and on the shard that they lie in,
    so that the same corpus always passes or always fails.
    """

    def __init__(self, fast: Engine, reference: Engine) -> None:
        """Put ``fast`` under the eye of ``reference``."""
        self._fast, self.reference = fast, reference
        self.name = fast.name

    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        """See Engine; nothing is compared here."""
        return self._fast.encode_batch(texts)

    def watch(self, parts: Sequence[str], first: bool) -> bool:
        """Compare a window of a document where it is large; whether all that it is encoded to is to be compared.

        Args:
            parts: of the document; none of them is encoded together with another.
            first: whether it is the first of its shard.

        Raises:
            FastPathError: where the engines differ on the window.
        """
        texts = [part.encode() for part in parts]
        digest = xxhash.xxh3_64()
        for text in texts:
            digest.update(text)
        chosen, size = digest.intdigest(), sum(map(len, texts))
        if chosen % CHECKED_ONE_IN == 0 or (first and size <= LARGE_BYTES):
            return True
        if size > LARGE_BYTES:
            for window in _window(texts, chosen % (size - WINDOW_BYTES)):
                self.compare(window, self._fast.encode_batch([window])[0])
        return False

    def compare(self, text: bytes, tokens: NDArray[np.uint32]) -> None:
        """Compare what the fast engine gave with the reference.

        Raises:
            FastPathError: where they differ.
        """
        (expected,) = self.reference.encode_batch([text])
        if not np.array_equal(tokens, expected):
            shared = min(len(tokens), len(expected))
            position = int(np.argmin(np.append(tokens[:shared] == expected[:shared], False)))
            raise FastPathError(
                f"{self.name} differs from {self.reference.name} at token {position} of a text of {len(text)} bytes, "
                f"which begins {text[:40]!r}: {tokens[position : position + 4].tolist()} is not "
                f"{expected[position : position + 4].tolist()}"
            )


def open_engine(name: str, reference: Engine, backend: Any, directory: Path | None) -> Engine:
    """The engine that ``corpus.engine`` names, for one tokenizer.

    Args:
        name: one of ENGINES.
        reference: what every engine must agree with: Hugging Face's tokenizers.
        backend: the ``tokenizers.Tokenizer``.
        directory: of the tokenizer, where it is one.

    Raises:
        UserError: for an engine that is not installed, cannot take this tokenizer, or does not give the tokens of
            tokenizer.json on a short text.
    """
    if name == "tokenizers":
        return reference
    if directory is not None and has_ranks(directory):
        reference = _agreeing(TiktokenEngine(directory, backend), reference)
    elif name == "tiktoken":
        raise UserError(f"corpus.engine=tiktoken needs a directory with {RANKS}; set corpus.engine=auto")
    if name == "gigatoken":
        return CheckedEngine(_agreeing(GigatokenEngine(backend), reference), reference)
    return reference


def reference_of(engine: Engine) -> Engine:
    """The engine itself, or what it is checked against."""
    return engine.reference if isinstance(engine, CheckedEngine) else engine


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a file of tiktoken's form, and their ranks."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {binascii.a2b_base64(token): int(rank) for token, rank in lines}


def _agreeing(engine: Engine, reference: Engine) -> Engine:
    probe = [PROBE.encode()]
    if not np.array_equal(engine.encode_batch(probe)[0], reference.encode_batch(probe)[0]):
        raise UserError(
            f"{engine.name} does not give the tokens of {reference.name} for this tokenizer; set "
            f"corpus.engine={reference.name}"
        )
    return engine


def _pattern(backend: Any) -> str:
    """The regular expression by which a tokenizer splits text, where that is its only rule."""
    state = {} if backend.pre_tokenizer is None else json.loads(backend.pre_tokenizer.__getstate__())
    steps = state.get("pretokenizers", [])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if len(patterns) != 1 or patterns[0] is None or backend.normalizer is not None:
        raise UserError("tokenizer.json does not split text by one regular expression; set corpus.engine=tokenizers")
    return patterns[0]


def _window(texts: Sequence[bytes], start: int) -> Iterator[bytes]:
    """The part of each text within 64 kB from byte ``start``, in whole characters."""
    for text in texts:
        if start < len(text) and start + WINDOW_BYTES > 0:
            yield text[max(start, 0) : start + WINDOW_BYTES].decode(errors="ignore").encode()
        start -= len(text)


# Llama 3.0's list; later releases gave some of the reserved ones names, at the same ids.
SPECIAL = (
    BOS,
    EOS,
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)


def convert_llama3(directory: Path, special: tuple[str, ...] = SPECIAL) -> None:
    """Write tokenizer.json and tokenizer_config.json beside tokenizer.model; BOS is put before each text, as Meta does.

    Raises:
        UserError: where there is no tokenizer.model of tiktoken's form.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    if not has_ranks(directory):
        raise UserError(f"{directory} has no {RANKS} of tiktoken's form; fetch it with fetch_llama3_tokenizer.sh")

    class Converter(TikTokenConverter):
        """transformers' own, without its need of tiktoken to read the file."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return read_ranks(Path(tiktoken_url))

    tokenizer = Converter(str(directory / RANKS), extra_special_tokens=list(special)).converted()
    bos = tokenizer.token_to_id(BOS)
    begin = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS).save_pretrained(directory)
