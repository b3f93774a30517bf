from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ropewalk.config.evaluation import EvaluateConfig
from ropewalk.config.groups import NeedleConfig, RopeConfig
from ropewalk.config.groups import TestTimeConfig as AtTestTime

TRAINED_LENGTH = 256
VOCAB_SIZE = 258  # 256 bytes, bos, eos


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, with bos and eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        add_bos_token=True,  # as Llama's own encode does
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    """A tiny Llama with random weights, large enough that its arg-maxes vary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=TRAINED_LENGTH,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    directory = tmp_path_factory.mktemp("runs") / "tiny" / "export"
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model(checkpoint) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(checkpoint).eval()


def words(count: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(["rope", "walk", "hemp", "strand", "yarn", "tar"]) for _ in range(count))


@pytest.fixture
def documents(tmp_path) -> Path:
    """Three documents of 600 words and one of 20, in the layout that preparation writes."""
    path = tmp_path / "prepared" / "heldout" / "documents.jsonl"
    path.parent.mkdir(parents=True)
    texts = {f"doc-{i}": words(600, i) for i in range(3)} | {"short": words(20, 9)}
    path.write_text("".join(json.dumps({"name": n, "text": t}) + "\n" for n, t in texts.items()))
    return tmp_path / "prepared"


@pytest.fixture
def config(checkpoint, documents, tmp_path) -> EvaluateConfig:
    """Of the checkpoint at half its trained length and at all of it, with the fewest needles."""
    return EvaluateConfig(
        checkpoint=str(checkpoint),
        documents=str(documents),
        output=str(tmp_path / "evaluation"),
        lengths=[128, 256],
        device="cpu",
        dtype="float32",
        needle=NeedleConfig(depths=[0.0, 1.0], samples=1),
        rope=RopeConfig(name="default"),
        test_time=AtTestTime(name="none"),
    )
