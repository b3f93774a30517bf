"""Preparation of visuals: videos with questions and answers, packed whole into sequences with their pixels."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.config.data import PrepareVideoConfig
from ropewalk.config.rules import one_of, validate_numbers
from ropewalk.data.prepare.chat import ChatEncoder
from ropewalk.data.prepare.token_files import BadRow
from ropewalk.data.prepare.tokenizer import DocumentEncoder, train_tokenizer
from ropewalk.data.prepare.video.frames import Example, read_footage
from ropewalk.data.prepare.video.scenes import CELLS, NAMES, QUARTERS, QUESTIONS, draw_scene
from ropewalk.data.store.describe import domain_table, next_commands
from ropewalk.data.store.manifest import MANIFEST, TOKENIZER
from ropewalk.data.store.reader import PackedSequence, PackedStore
from ropewalk.data.store.tokenizer_files import copy_tokenizer, open_tokenizer
from ropewalk.data.store.visuals import Visual
from ropewalk.data.store.writer import Accounting, PartWriter, commit_store, write_parts
from ropewalk.errors import UserError
from ropewalk.files import inside, only_writer, sha256_of, writing

DOMAIN = "visuals"
OPEN_SEQUENCES = 16  # that a document may still be put into
TOO_LONG = "longer than a sequence"
START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"  # Qwen2-VL's
SCENE_ENTRIES = 320  # of the tokenizer that is trained on the questions, before these four


def prepare_video(config: PrepareVideoConfig) -> PackedStore:
    """Write ``output/packed-LENGTH`` and ``output/tokenizer``; print what became of the visuals.

    Raises:
        UserError: for a configuration, tokenizer or file that does not fit, or an output that is a store already.
    """
    validate_prepare_video(config)
    output, name = Path(config.output), f"output={config.output}"
    root = output / f"packed-{config.sequence_length}"
    if (root / MANIFEST).exists():
        raise UserError(f"{root} is a packed store already; remove it or choose another output")
    encoder = VisualEncoder(_tokenizer(config))
    with writing(name, output), only_writer(output, name):
        store = _write(config, encoder, root)
    for line in (*domain_table([store]), *next_commands([store], output)):
        print(line, flush=True)
    return store


def _write(config: PrepareVideoConfig, encoder: VisualEncoder, root: Path) -> PackedStore:
    shutil.rmtree(root / DOMAIN, ignore_errors=True)  # of a call that was killed
    root.mkdir(parents=True, exist_ok=True)
    encoder.encoder.save(root.parent / TOKENIZER)
    tokenizer = copy_tokenizer(root.parent / TOKENIZER, root / TOKENIZER)
    dropped = Counter[str]()
    documents = map(encoder.encode, _drawn(config) if config.visuals is None else _listed(config))
    sequences = pack_in_turn(documents, config.sequence_length, dropped)
    writer = PartWriter(root, DOMAIN, config.sequence_length, tokenizer["vocab_size"])
    info = writer.assemble(list(write_parts(writer, sequences, config.shard_sequences)))
    account = Accounting(info.tokens + sum(dropped.values()), dropped=dict(dropped))
    for reason, tokens in dropped.items():
        print(f"left out: {tokens:,} tokens {reason}", flush=True)
    return commit_store(
        root, config.sequence_length, tokenizer, {DOMAIN: info}, {DOMAIN: account}, [_source(config)],
        {"bos": bool(len(encoder.encoder.head)), "eos": bool(len(encoder.encoder.tail)), "eos_left_off": 0},
    )  # fmt: skip


class VisualEncoder:
    """Puts a visual and its question into tokens, by the tokenizer's chat template where it has one.

    Without a template a document is [BOS] start, placeholders, end, question, line break, answer, [EOS]. Only what the
    template marks as the assistant's, or answer and EOS, is trained.
    """

    def __init__(self, encoder: DocumentEncoder) -> None:
        """Take an encoder whose tokenizer has Qwen2-VL's four tokens.

        Raises:
            UserError: where it lacks one.
        """
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        vocabulary = self.tokenizer.get_vocab()
        for token in (START, END, IMAGE, VIDEO):
            if token not in vocabulary:
                raise UserError(
                    f"tokenizer={self.tokenizer.name_or_path} has no token {token}; use the one of a Qwen2-VL model"
                )
        self.ids: dict[str, int] = {token: vocabulary[token] for token in (START, END, IMAGE, VIDEO)}
        self.chat = ChatEncoder(self.tokenizer) if self.tokenizer.chat_template else None

    def encode(self, example: Example) -> PackedSequence:
        """One document: tokens, loss mask and the visual, unpadded.

        Raises:
            UserError: for a question or answer that the template refuses, or a template without a place for the visual.
        """
        footage = example.footage
        kind = IMAGE if len(footage.pixels) == 1 else VIDEO
        tokens, mask = self._in_chat(example, kind, self.chat) if self.chat else self._plain(example, kind)
        (places,) = np.nonzero(tokens == self.ids[kind])
        if len(places) != 1:
            raise UserError(f"the chat template gives {len(places)} places to one visual; it must put {kind} in one")
        start, count = int(places[0]), int(np.prod(footage.grid))
        tokens = np.concatenate([tokens[:start], np.repeat(tokens[start : start + 1], count), tokens[start + 1 :]])
        mask = np.concatenate([mask[:start], np.zeros(count, np.bool_), mask[start + 1 :]])
        visual = Visual(start, *footage.grid, footage.pixels, footage.frame_seconds)
        return PackedSequence(tokens.astype(np.uint32), np.array([len(tokens)], np.int32), mask, (visual,))

    def _plain(self, example: Example, kind: str) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        question, answer = self.encoder.encode_texts([f"{example.question}\n", example.answer])
        seen = np.array([self.ids[token] for token in (START, kind, END)], np.uint32)
        prompt = np.concatenate([self.encoder.head, seen, question])
        said = np.concatenate([answer, self.encoder.tail])
        return np.concatenate([prompt, said]), np.arange(len(prompt) + len(said)) >= len(prompt)

    def _in_chat(self, example: Example, kind: str, chat: ChatEncoder) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        seen = {"type": "image" if kind == IMAGE else "video"}
        messages = [
            {"role": "user", "content": [seen, {"type": "text", "text": example.question}]},
            {"role": "assistant", "content": [{"type": "text", "text": example.answer}]},
        ]
        try:
            return chat.encode(messages)
        except BadRow as error:
            raise UserError(f"the question {example.question!r} cannot be used: {error}; leave it out") from None


def pack_in_turn(
    documents: Iterable[PackedSequence], sequence_length: int, dropped: Counter[str]
) -> Iterator[PackedSequence]:
    """Whole documents into sequences, in one pass: each goes into the fullest open sequence that has space for it.

    Args:
        documents: unpadded, of one piece each.
        sequence_length: tokens.
        dropped: tokens of documents that are longer are counted here.
    """
    opened: list[list[PackedSequence]] = []
    for document in documents:
        if len(document.tokens) > sequence_length:
            dropped[TOO_LONG] += len(document.tokens)
            continue
        fitting = [held for held in opened if _length(held) + len(document.tokens) <= sequence_length]
        if fitting:
            max(fitting, key=_length).append(document)
            continue
        if len(opened) == OPEN_SEQUENCES:
            fullest = max(range(len(opened)), key=lambda number: _length(opened[number]))
            yield _joined(opened.pop(fullest), sequence_length)
        opened.append([document])
    for held in opened:
        yield _joined(held, sequence_length)


def _length(documents: list[PackedSequence]) -> int:
    return sum(len(document.tokens) for document in documents)


def _joined(documents: list[PackedSequence], sequence_length: int) -> PackedSequence:
    tokens, mask = np.zeros(sequence_length, np.uint32), np.zeros(sequence_length, np.bool_)
    ends, visuals = [], []
    start = 0
    for document in documents:
        end = start + len(document.tokens)
        tokens[start:end], mask[start:end] = document.tokens, document.loss_mask
        visuals += [visual.moved(start) for visual in document.visuals]
        ends.append(end)
        start = end
    return PackedSequence(tokens, np.array(ends, np.int32), mask, tuple(visuals))


def validate_prepare_video(config: PrepareVideoConfig) -> None:
    """Raise UserError for numbers out of range, or visuals that are none of both sources or of both."""
    validate_numbers(config)
    scenes = config.scenes
    if (config.visuals is None) == (scenes.count == 0):
        raise UserError(
            f"visuals={config.visuals} and scenes.count={scenes.count}: name a file of visuals, or a number of drawn "
            "scenes"
        )
    if config.visuals is not None and config.tokenizer is None:
        raise UserError("tokenizer=null: visuals from files need the model's tokenizer; name its directory or hub id")
    if len(scenes.frames) != 2 or not 1 <= scenes.frames[0] <= scenes.frames[1]:
        raise UserError(f"scenes.frames={scenes.frames} must be the fewest and the most frames of a scene: [8, 32]")
    if not scenes.questions:
        raise UserError(f"scenes.questions=[] asks nothing; name one or more of: {', '.join(QUESTIONS)}")
    sides = [tokens * config.tower.patch_size * config.tower.merge_size for tokens in (scenes.height, scenes.width)]
    if scenes.count and min(sides) < 2 * CELLS:
        raise UserError(
            f"scenes of {sides[0]} x {sides[1]} pixels cannot show a symbol of {CELLS} x {CELLS} in the middle half "
            f"of each side; give each side {2 * CELLS} or more by scenes.height, scenes.width or tower.patch_size"
        )
    for kind in scenes.questions:
        one_of("scenes.questions", kind, tuple(QUESTIONS))


def _tokenizer(config: PrepareVideoConfig) -> DocumentEncoder:
    if config.tokenizer is not None:
        directory = Path(config.tokenizer) if Path(config.tokenizer).is_dir() else None
        return DocumentEncoder(open_tokenizer(config.tokenizer, "tokenizer"), directory=directory)
    texts = [f"{question}\n{answer}" for question in QUESTIONS.values() for answer in (*NAMES, *QUARTERS)]
    encoder = train_tokenizer(texts, SCENE_ENTRIES)
    encoder.tokenizer.add_tokens([START, END, IMAGE, VIDEO], special_tokens=True)
    return encoder


def _source(config: PrepareVideoConfig) -> dict[str, Any]:
    """The origin of the visuals, for the manifest; no path."""
    if config.visuals is None:
        return {"kind": "scenes", "seed": config.seed, **asdict(config.scenes)}
    return {"kind": "visuals", "sha256": sha256_of(Path(config.visuals)), **asdict(config.frames)}


def _drawn(config: PrepareVideoConfig) -> Iterator[Example]:
    for number in range(config.scenes.count):
        yield draw_scene(config.scenes, config.tower, config.seed, number)


def _listed(config: PrepareVideoConfig) -> Iterator[Example]:
    """The visuals of a file of JSON lines; paths in it are relative to it, and none leads out of its directory."""
    for path, row in listed_rows(Path(str(config.visuals)), "visuals"):
        yield Example(read_footage(path, config.tower, config.frames), row["question"], row["answer"])


def listed_rows(listing: Path, key: str) -> list[tuple[Path, dict[str, Any]]]:
    """The file and the fields of every line of a file of JSON lines, all checked before the first is decoded.

    Args:
        listing: the file.
        key: of the configuration, which names it.

    Raises:
        UserError: for a file or a line that is not as it should be.
    """
    try:
        text = listing.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={listing} cannot be read ({error}); name a file of JSON lines") from error
    lines = text.removesuffix("\n").split("\n")  # not splitlines: a question may hold other line ends
    return [_row(listing, number, line) for number, line in enumerate(lines, 1)]


def _row(listing: Path, number: int, line: str) -> tuple[Path, dict[str, Any]]:
    """The file and the fields of a line."""
    where = f"{listing}, line {number}"
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); write one object a line") from error
    fields = ("visual", "question", "answer")
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) and row[name] for name in fields):
        raise UserError(f"{where} must have visual (a path), question and answer, each a text that is not empty")
    path = inside(listing.parent, row["visual"])
    if not path.is_file():
        raise UserError(f"{where} names visual={path}, which is no file; correct it, or leave the line out")
    return path, row
