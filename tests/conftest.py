"""Fixtures of all tests: the committed corpus and tokenizer, and small stores built from them."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from ropewalk.config.data import CorpusConfig, PrepareConfig
from ropewalk.data import PackedStore
from ropewalk.data.prepare.pipeline import prepare

os.environ["WANDB_MODE"] = "offline"  # on a machine with a key, too
FIXTURES = Path(__file__).parent / "fixtures"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="interpreter of an environment with vllm or sglang, whose rotary tables are compared then",
    )


@pytest.fixture(scope="session")
def fixture_corpus() -> Path:
    """Directory of 39 public-domain texts."""
    return FIXTURES / "corpus"


@pytest.fixture(scope="session")
def fixture_tokenizer() -> Path:
    """Directory of a 512-entry byte-level BPE."""
    return FIXTURES / "tokenizer"


@pytest.fixture(scope="session")
def packed_store(
    tmp_path_factory: pytest.TempPathFactory, fixture_corpus: Path, fixture_tokenizer: Path
) -> Callable[[int], PackedStore]:
    """``packed_store(sequence_length)``: the fixture corpus as a store with the domains long and short."""

    @cache
    def build(sequence_length: int) -> PackedStore:
        corpus = CorpusConfig(name="fixture", paths=[str(fixture_corpus)], tokenizer=str(fixture_tokenizer))
        output = tmp_path_factory.mktemp("prepared") / "fixture"
        config = PrepareConfig(output=str(output), sequence_lengths=[sequence_length], corpus=corpus)
        return PackedStore(prepare(config, report=lambda line: None) / f"packed-{sequence_length}")

    return build


@pytest.fixture(scope="session")
def store_64(packed_store: Callable[[int], PackedStore]) -> PackedStore:
    """The fixture corpus in sequences of 64 tokens."""
    return packed_store(64)


@pytest.fixture(scope="session")
def store_256(packed_store: Callable[[int], PackedStore]) -> PackedStore:
    """The fixture corpus in sequences of 256 tokens."""
    return packed_store(256)
