"""The checkpoint under evaluation, checked before a model is loaded, and loaded under one spectrum at a time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ropewalk.config.evaluation import EvaluateConfig
from ropewalk.config.groups import RopeConfig, TestTimeConfig
from ropewalk.config.rules import require_device
from ropewalk.evaluation.plan import (
    check_engine,
    checked_checkpoint,
    checkpoint_sha256,
    load_tokenizer,
    method_name,
    run_name,
)
from ropewalk.evaluation.prefill import Reader
from ropewalk.evaluation.settings import Setting, settings_by_length
from ropewalk.model.load import load_for_evaluation, read_position
from ropewalk.rope import Position, RopeChain
from ropewalk.training.distributed import Ranks


@dataclass(frozen=True)
class Subject:
    """A checkpoint and how it is asked.

    Attributes:
        config: of the evaluation.
        directory: Hugging Face directory.
        position: how it rotates.
    """

    config: EvaluateConfig
    directory: Path
    position: Position

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside it, checked against its vocabulary."""
        return load_tokenizer(self.directory)

    @property
    def trained_length(self) -> int:
        """Tokens that it was trained at."""
        return self.position.trained_length

    def settings(self, lengths: list[int], test_time: TestTimeConfig | None = None) -> dict[int, Setting]:
        """The spectrum of each length on its own, by length.

        Raises:
            UserError: from a method that does not fit, or a length beyond what its spectrum is defined for.
        """
        chosen = test_time or self.config.test_time
        return {n: settings_by_length(self.position, self.config.rope, chosen, [n])[0] for n in lengths}

    def load(self, setting: Setting, length: int, device: str) -> Reader:
        """The model under a setting's spectrum at ``length`` tokens."""
        model = load_for_evaluation(
            self.directory, extra=setting.extra, length=length, dtype=self.config.dtype, device=device
        )
        return Reader(model, self.config.prefill_chunk)

    def language_model(self, setting: Setting, length: int, overflow: str, ranks: Ranks) -> Any:
        """The model as lm-eval takes it, in process or in vLLM, for prompts of ``length`` tokens, answer included."""
        if self.config.backend == "vllm":
            from ropewalk.evaluation.harness.vllm import load_vllm

            return load_vllm(self, setting, length, overflow)
        from ropewalk.evaluation.harness.lm import ReaderLM

        reader = self.load(setting, length, ranks.local_device(self.config.device))
        return ReaderLM(reader, self.tokenizer, length, overflow, ranks)

    def columns(self, setting: Setting) -> dict[str, str]:
        """The columns of the table that every row under ``setting`` shares."""
        return {
            "run": run_name(self.config, self.directory),
            "method": method_name(self.config.rope, self.position),
            "chain": str(setting.chain),
            "test_time_scaling": scaling_name(setting, self.config.rope),
        }

    def identity(self, setting: Setting, length: int) -> dict[str, Any]:
        """What a number depends on besides its task: weights, spectrum at ``length`` and number format."""
        spectrum = [setting.spectrum.inv_freq.tolist(), setting.spectrum.attention_scaling]
        return {
            "checkpoint": checkpoint_sha256(self.directory),
            "chain": str(setting.chain),
            "spectrum": hashlib.sha256(json.dumps(spectrum).encode()).hexdigest(),
            "length": length,
            "dtype": self.config.dtype,
            "backend": self.config.backend,
            "seed": self.config.seed,
        }


def make_subject(config: EvaluateConfig) -> Subject:
    """Resolve and check the checkpoint and the ways to run it.

    Raises:
        UserError: naming the value, the rule and the mend.
    """
    check_engine(config)
    require_device("device", config.device)
    directory = checked_checkpoint(config.checkpoint)
    subject = Subject(config, directory, read_position(directory))
    _ = subject.tokenizer  # read now, before any model: every suite needs it
    return subject


def scaling_name(setting: Setting, rope: RopeConfig) -> str:
    """The printed test-time part of a setting's chain; what the ``rope`` group appended is the method's part."""
    steps = setting.extra[len(rope.chain) :]
    return str(RopeChain(steps)) if steps else "none"
