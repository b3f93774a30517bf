"""Fixtures of all tests: a clone to work in, the committed corpus and tokenizer, small stores built from them."""

import os
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from functools import cache
from pathlib import Path

import pytest

from ropewalk.config.data import CorpusConfig, PrepareConfig
from ropewalk.data import PackedStore
from ropewalk.data.prepare.pipeline import prepare

os.environ["WANDB_MODE"] = "offline"  # on a machine with a key, too
ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
# the repository without what a run or an installation adds: data/, outputs/, .venv/
CLONED = (
    "Makefile", "benchmarks", "configs", "data_prep", "docs", "pyproject.toml", "recipes", "requirements-docs.lock",
    "requirements.lock", "scripts", "slurm", "src", "tests", "train.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="path of an interpreter with vllm or sglang, whose rotary tables are compared then",
    )
    parser.addoption(
        "--kernels",
        metavar="DIRECTORY",
        help="archives of flash-attn and flash-attn-4, whose sources and signatures are compared then",
    )
    parser.addoption(
        "--smollm2",
        metavar="DIRECTORY",
        help="what recipes/smollm2_135m_cpu/fetch.py has fetched; its export is verified then",
    )


@contextmanager
def working_in_clone(directory: Path) -> Iterator[Path]:
    for name in CLONED:
        (directory / name).symlink_to(ROOT / name)
    with chdir(directory):
        yield directory


@pytest.fixture(scope="session", autouse=True)
def shared_clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of fixtures that several tests share."""
    with working_in_clone(tmp_path_factory.mktemp("clone")) as directory:
        yield directory


@pytest.fixture(autouse=True)
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of a test and of the processes that it starts: a fresh clone, without data and outputs.

    Whatever relative path a configuration, a recipe or a job script names, it is not the checkout's own.
    """
    with working_in_clone(tmp_path_factory.mktemp("clone")) as directory:
        yield directory


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
