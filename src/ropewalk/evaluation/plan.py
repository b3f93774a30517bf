"""Everything that an evaluation needs, checked and made before a model is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer

from ropewalk.config import EvaluateConfig, RopeConfig, existing_directory, one_of, require_device
from ropewalk.data.retrieval import number_of_keys
from ropewalk.errors import UserError
from ropewalk.evaluation.documents import Windows, make_windows
from ropewalk.evaluation.prompts import Prompt, build_grid
from ropewalk.evaluation.results import writable_directory
from ropewalk.evaluation.settings import Setting, settings_by_length
from ropewalk.export import resolve_checkpoint
from ropewalk.model import read_position
from ropewalk.rope.position import Position
from ropewalk.runs.directory import RunDirectory

NOT_MEASURED = ("output", "overwrite", "paths", "suite", "backend", "prefill_chunk")  # settings no number depends on
DEVICES = ("cuda", "cpu", "auto")
SHORTEST = 64  # tokens; a shorter context has no bucket of its own


@dataclass(frozen=True)
class Plan:
    """What an evaluation runs on, made before a model is loaded."""

    config: EvaluateConfig
    directory: Path
    output: Path
    position: Position
    settings: list[Setting]
    windows: Windows
    prompts: dict[int, list[Prompt]]  # by context length

    @property
    def run(self) -> str:
        """Name of the run: the configured one, else that of its directory, of which an export is a part."""
        return run_name(self.config, self.directory)

    @property
    def identity(self) -> dict[str, str]:
        """What the results depend on besides this code: settings, checkpoint and tokens, as SHA-256 of each."""
        settings = {k: v for k, v in asdict(self.config).items() if k not in NOT_MEASURED}
        return {
            "settings_sha256": _sha256(settings),
            "checkpoint_sha256": checkpoint_sha256(self.directory),
            "windows_sha256": _sha256({name: ids.tolist() for name, ids in self.windows.tokens.items()}),
        }

    @property
    def document_prefixes(self) -> dict[str, str]:
        """SHA-256 of each document's first tokens: what tells that two evaluations read the same text and tokens."""
        return {name: _sha256(ids[:SHORTEST].tolist()) for name, ids in self.windows.tokens.items()}

    @property
    def method(self) -> str:
        """The checkpoint's method, or the ``rope`` group's where one is applied; both where there are two."""
        return method_name(self.config.rope, self.position)

    @property
    def tokens(self) -> int:
        """Tokens of all forward passes."""
        documents = sum(setting.longest for setting in self.settings) * len(self.windows.tokens)
        return documents + sum(length * len(prompts) for length, prompts in self.prompts.items())


def run_name(config: EvaluateConfig, directory: Path) -> str:
    """Name of the run: the configured one, else that of its directory, of which an export is a part."""
    resolved = directory.resolve()
    return config.name or (resolved.parent if resolved == RunDirectory(resolved.parent).export else resolved).name


def method_name(rope: RopeConfig, own: Position) -> str:
    """The checkpoint's method, or the ``rope`` group's where one is applied; both where there are two."""
    if not rope.chain:
        return own.name
    return f"{own.name}+{rope.name}" if own.chain.steps else rope.name


def checkpoint_sha256(directory: Path) -> str:
    """SHA-256 of a checkpoint's config, what it was exported from, and the sizes of its weights."""
    weights = sorted((p.name, p.stat().st_size) for p in directory.glob("*.safetensors"))
    described = [directory / name for name in ("config.json", "export.json")]
    return _sha256([[path.read_text() for path in described if path.exists()], weights])


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_plan(config: EvaluateConfig) -> Plan:
    """Check the configuration, read position, tokenizer and documents, and write every prompt.

    Raises:
        UserError: naming the value, the rule and the mend.
    """
    check_settings(config)
    require_device("device", config.device)
    documents = existing_directory("documents", str(config.documents), "write one with data_prep/prepare.py")
    directory = checked_checkpoint(config.checkpoint)
    position = read_position(directory)
    settings = settings_by_length(position, config.rope, config.test_time, config.lengths)
    tokenizer = load_tokenizer(directory)
    windows = make_windows(documents, tokenizer, config.lengths[-1], config.max_documents)
    prompts = {length: build_grid(tokenizer, windows, length, config.needle, config.seed) for length in config.lengths}
    output = writable_directory("output", config.output)
    return Plan(config, directory, output, position, settings, windows, prompts)


def checked_checkpoint(path: str) -> Path:
    """The Hugging Face directory of a checkpoint, every weight file whole.

    Raises:
        UserError: where ``path`` is no checkpoint, or a shard of it is missing or cut short.
    """
    directory = resolve_checkpoint(path)
    index = directory / "model.safetensors.index.json"
    shards = {file.name for file in directory.glob("*.safetensors")}
    if index.is_file():
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(wanted - shards):
            raise UserError(
                f"checkpoint={directory} lacks {', '.join(missing[:3])} ({len(missing)} of {len(wanted)} weight files)"
                "; copy it again, whole"
            )
    for name in sorted(shards):
        try:
            with safe_open(directory / name, "pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"checkpoint={directory}: {name} is damaged ({error}); copy it again, whole") from error
    return directory


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer beside a checkpoint.

    Raises:
        UserError: where there is none, or it has tokens that the model has no embedding for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint={directory} has no tokenizer that transformers reads; copy the files of the one it "
            "was trained with (tokenizer.json, tokenizer_config.json) into it"
        ) from error
    vocab_size = AutoConfig.from_pretrained(directory).vocab_size
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer of checkpoint={directory} has {len(tokenizer)} tokens, but the model embeds "
            f"{vocab_size}; put the tokenizer that the model was trained with beside it"
        )
    return tokenizer


def check_settings(config: EvaluateConfig) -> None:
    """Check the settings of suite=quick by themselves, without the machine, the checkpoint and the documents.

    Raises:
        UserError: naming the value, the rule and the mend.
    """
    lengths, needle = config.lengths, config.needle
    if config.documents is None:
        raise UserError(
            "documents is not set, and suite=quick reads held-out documents; name a directory that data_prep/prepare.py"
            " wrote, or one of text files"
        )
    if not lengths or min(lengths) < SHORTEST:
        raise UserError(f"lengths={lengths} must name contexts of {SHORTEST} tokens or more; try [512,1024]")
    if lengths != sorted(set(lengths)):
        raise UserError(f"lengths={lengths} must ascend without repeats; write {sorted(set(lengths))}")
    if config.max_documents is not None and config.max_documents < 1:
        raise UserError(f"max_documents={config.max_documents} must be 1 or more, or null for all")
    if not needle.depths or not all(0 <= depth <= 1 for depth in needle.depths):
        raise UserError(f"needle.depths={needle.depths} must be shares between 0 and 1; try [0.0,0.5,1.0]")
    if len(set(needle.depths)) != len(needle.depths):
        raise UserError(f"needle.depths={needle.depths} must differ; name each depth once")
    if needle.samples < 0 or len(needle.depths) * needle.samples == 1:
        raise UserError(
            f"needle.samples={needle.samples} over {len(needle.depths)} depths: the shuffled-answer control "
            "needs at least two prompts of a length; set needle.samples=2 or more, or 0 for no needle grid"
        )
    if needle.digits < 1 or not 0 <= needle.distractors < number_of_keys(needle.digits):
        raise UserError(
            f"needle.digits={needle.digits} must be 1 or more, and needle.distractors={needle.distractors} 0 "
            "or more but fewer than there are keys of so many digits; the passkey test has 5 and 0"
        )
    check_engine(config)


def check_engine(config: EvaluateConfig) -> None:
    """Raise UserError for a number format, device or backend that is not known."""
    one_of("dtype", config.dtype, ("bfloat16", "float32"))
    one_of("device", config.device, DEVICES)
    one_of("backend", config.backend, ("transformers", "vllm"))
