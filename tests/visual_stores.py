"""Small stores of visuals, and the tiny model of images and videos that reads them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from helpers import composed
from transformers import AutoConfig

from ropewalk.data import PackedStore
from ropewalk.data.store.reader import PackedSequence
from ropewalk.data.store.visuals import Visual
from ropewalk.data.store.writer import Accounting, write_store

IMAGE, VIDEO = 508, 509  # of the fixture tokenizer's 512 tokens
LENGTH = 96
TOWER = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 4, "spatial_merge_size": 2,
         "temporal_patch_size": 2, "mlp_ratio": 2}  # fmt: skip
ARCHITECTURE = {
    "model_type": "qwen2_vl", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "image_token_id": IMAGE, "video_token_id": VIDEO,
    "bos_token_id": 0, "eos_token_id": 1, "vision_start_token_id": 510, "vision_end_token_id": 511,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "vision_config": TOWER, "initializer_range": 0.1,
    "tie_word_embeddings": False,
}  # fmt: skip


def tiny_config(**changes: Any) -> Any:
    """The config of that model; of a copy, since transformers writes into the entries that it is given."""
    return AutoConfig.for_model(**deepcopy({**ARCHITECTURE, **changes}))


# A sequence is a list of documents, a document its stretches of text and the grids between them.
SEQUENCES: list[list[tuple[list[int], list[tuple[int, int, int]]]]] = [
    [([3, 8], [(4, 2, 3)]), ([5, 2, 6], [(1, 3, 2), (2, 2, 2)])],
    [([9, 9], [(3, 1, 2)]), ([20], [])],
    [([30], [])],
]


def visual_of(rng: np.random.Generator, start: int, grid: tuple[int, int, int], pixels: bool = True) -> Visual:
    """A visual of noise, for a tower of 8 pixels a token; or of embeddings of 64 channels."""
    frames, height, width = grid
    seconds = 0.0 if frames == 1 else 1.3
    if pixels:
        shape = (1 if frames == 1 else 2 * frames, 8 * height, 8 * width, 3)
        return Visual(start, *grid, rng.integers(0, 256, shape, dtype=np.uint8), seconds)
    values = rng.standard_normal((frames * height * width, 64)).astype(np.float32)
    return Visual(start, *grid, (values.view(np.uint32) >> 16).astype(np.uint16), seconds)  # the bits of bfloat16


def sequence_of(rng: np.random.Generator, documents: Any, pixels: bool = True, length: int = LENGTH) -> PackedSequence:
    tokens, mask, ends = [], [], []
    visuals: list[Visual] = []
    for texts, grids in documents:
        for number, text in enumerate(texts):
            tokens += rng.integers(4, 500, text).tolist()
            mask += [True] * text
            if number < len(grids):
                visuals.append(visual_of(rng, len(tokens), grids[number], pixels))
                placeholders = visuals[-1].tokens
                tokens += [IMAGE if grids[number][0] == 1 else VIDEO] * placeholders
                mask += [False] * placeholders
        ends.append(len(tokens))
    padding = length - len(tokens)
    row = np.array(tokens + [0] * padding, np.uint32)
    return PackedSequence(row, np.array(ends, np.int32), np.array(mask + [False] * padding), tuple(visuals))


def make_store(root: Path, tokenizer: Path, *, pixels: bool = True, count: int = 12) -> PackedStore:
    rng = np.random.default_rng(0)
    sequences = [sequence_of(rng, SEQUENCES[number % len(SEQUENCES)], pixels) for number in range(count)]
    tokens = sum(int(sequence.ends[-1]) for sequence in sequences)
    return write_store(root, LENGTH, {"visuals": sequences}, tokenizer, {"visuals": Accounting(tokens)})


def video_arguments(store: PackedStore, run_dir: Path, arm: str, *overrides: str) -> list[str]:
    """The overrides that make ``python train.py`` take four steps of the tiny model on a store of visuals."""
    return [
        "+experiment=demo/pretrain", "tracker=none", "data=packed", f"data.store={store.root}",
        f"data.sequence_length={store.sequence_length}", f"run_dir={run_dir}", f"run_name={run_dir.name}",
        "trainer.max_steps=4", "trainer.global_batch_size=4", "trainer.micro_batch_size=2",
        "trainer.learning_rate=3e-3", "trainer.checkpoint_every=2", "model.pretrained_length=64", "model.head_dim=32",
        "++model.architecture=" + str(ARCHITECTURE).replace("'", ""), f"rope={arm}", *overrides,
    ]  # fmt: skip


def video_run(store: PackedStore, run_dir: Path, arm: str, *overrides: str, **architecture: Any) -> Any:
    """The TrainConfig of these overrides, with fields of the architecture changed."""
    config = composed("train", *video_arguments(store, run_dir, arm, *overrides))
    config.model.architecture = {} if config.model.path else {**config.model.architecture, **architecture}
    return config
