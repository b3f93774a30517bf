"""The checkpoint under evaluation, checked before a model is loaded, and the settings that it runs under.

A setting is one spectrum and the context lengths that run under it; one model is loaded at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.config.evaluation import EvaluateConfig
from ropewalk.config.groups import RopeConfig, TestTimeConfig
from ropewalk.config.rules import one_of, validate_device
from ropewalk.data.store.tokenizer_files import adds_bos, adds_eos, begin_with, open_tokenizer, set_bos
from ropewalk.errors import UserError
from ropewalk.export import resolve_checkpoint
from ropewalk.export.portable import place_portable, write_portable_config
from ropewalk.files import read_object, sampled_sha256, sha256_of_json, write_atomically
from ropewalk.model.hf_directory import StoredWeights, read_config
from ropewalk.model.load import load_for_evaluation, read_position
from ropewalk.rope import Position, RopeChain, Spectrum
from ropewalk.rope.chain import Steps, check_trained
from ropewalk.rope.position import METADATA_KEY, position_of
from ropewalk.runs.directory import run_name, run_of

LENGTH_RATIO = "length_over_trained"  # in a chain: a factor that follows the length under evaluation


@dataclass(frozen=True)
class Setting:
    """One spectrum and the context lengths that run under it.

    Attributes:
        extra: methods appended to the checkpoint's own chain, words such as ``trained_length`` resolved.
        chain: the whole chain.
        spectrum: its spectrum at each of ``lengths``.
        lengths: tokens, ascending; one forward pass at the last serves them all, since the model is causal.
    """

    extra: tuple[dict[str, Any], ...]
    chain: RopeChain
    spectrum: Spectrum
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        """The printed extra chain, or ``none``."""
        return str(RopeChain(self.extra)) if self.extra else "none"

    @property
    def longest(self) -> int:
        """Tokens of the pass."""
        return self.lengths[-1]

    def record(self) -> dict[str, Any]:
        """The setting as JSON: chain, lengths in tokens, inverse frequencies in radians per token."""
        return {
            "setting": self.name,
            "chain": str(self.chain),
            "chain_sha256": self.chain.sha256,
            "lengths": list(self.lengths),
            "inv_freq": self.spectrum.inv_freq.tolist(),
            "attention_scaling": self.spectrum.attention_scaling,
        }


def settings_by_length(
    position: Position, rope: RopeConfig, test_time: TestTimeConfig, lengths: Sequence[int]
) -> list[Setting]:
    """Group ``lengths`` (ascending) by the spectrum that each one runs under.

    ``rope`` is appended to the checkpoint's chain at every length. Then follows ``test_time.at`` if it has the length,
    else ``test_time.within`` up to the trained length and ``test_time.beyond`` past it. Neighbouring lengths share a
    setting if spectrum and attention scaling are equal; a length-dependent chain gets one for each length.

    Raises:
        UserError: from the chain, for a method that does not fit.
    """
    settings: list[Setting] = []
    for length in lengths:
        ruled = test_time.within if length <= position.trained_length else test_time.beyond
        test = _follow(test_time.at.get(length, ruled), length / position.trained_length)
        setting = _setting(position, [*rope.chain, *test], length)
        if settings and _same_spectrum(settings[-1].spectrum, setting.spectrum):
            settings[-1] = replace(settings[-1], lengths=(*settings[-1].lengths, length))
        else:
            settings.append(setting)
    return settings


def check_chains(rope: RopeConfig, test_time: TestTimeConfig) -> None:
    """Check every chain that an evaluation may append, without the checkpoint that it would follow.

    Raises:
        UserError: from the chain, for a method or an argument that is not known, or frequencies that training gives.
    """
    for steps in (rope.chain, test_time.within, test_time.beyond, *test_time.at.values()):
        check_trained(RopeChain(_follow(steps, 2.0)))  # whatever the ratio


def _follow(steps: Steps, ratio: float) -> list[dict[str, Any]]:
    """``steps`` with the ratio of the length to the trained one in place of the word for it."""
    return [{name: ratio if value == LENGTH_RATIO else value for name, value in step.items()} for step in steps]


def _setting(position: Position, extra: Steps, length: int) -> Setting:
    extended = position.extended(extra)
    check_trained(extended.chain)
    added = RopeChain(extra)
    first = extended.chain.structure().to_list() if added.structure().steps else []
    resolved = [*first, *extended.chain.frequencies().to_list()[len(position.chain.frequencies().steps) :]]
    return Setting(tuple(resolved), extended.chain, extended.spectrum(length=length), (length,))


def _same_spectrum(a: Spectrum, b: Spectrum) -> bool:
    beside = [(one.attention_scaling, one.axes, one.layers, one.temperature) for one in (a, b)]
    return beside[0] == beside[1] and np.array_equal(a.inv_freq, b.inv_freq)


DEVICES = ("cuda", "cpu", "auto")


@dataclass(frozen=True)
class EvaluatedCheckpoint:
    """A checkpoint and the settings that it is evaluated under.

    Attributes:
        config: of the evaluation.
        directory: Hugging Face directory.
        position: how it rotates.
    """

    config: EvaluateConfig
    directory: Path
    position: Position

    @property
    def tokenizer(self) -> Any:
        """The tokenizer beside it, checked against its vocabulary; it begins texts as in training, and ends none."""
        return self._opened[0]

    @cached_property
    def _opened(self) -> tuple[Any, bool | None]:
        """The tokenizer, and whether it now puts BOS before a text where its files say otherwise; None: as they say.

        The record of the run says how its documents began; without one, the tokenizer's own way holds.
        """
        tokenizer = load_tokenizer(self.directory)
        if not tokenizer.is_fast:
            return tokenizer, None
        own = adds_bos(tokenizer)
        trained = read_object(run_of(self.config.checkpoint)[0].record).get("special_tokens", {}).get("bos")
        begins = own if trained is None or tokenizer.bos_token is None else bool(trained)
        if begins == own and not adds_eos(tokenizer):
            return tokenizer, None
        begin_with(tokenizer.backend_tokenizer, tokenizer.bos_token if begins else None)
        return tokenizer, begins

    @property
    def run(self) -> str:
        """Name of the run: the configured one, else that of the run that the checkpoint belongs to."""
        return self.config.name or run_name(self.config.checkpoint)

    @property
    def method(self) -> str:
        """The checkpoint's method, or the ``rope`` group's if one is applied; both if there are two."""
        own, applied = self.position, self.config.rope
        if not applied.chain:
            return own.name
        return f"{own.name}+{applied.name}" if own.chain.steps else applied.name

    @property
    def trained_length(self) -> int:
        """Tokens that it was trained at."""
        return self.position.trained_length

    def settings(self, lengths: list[int], test_time: TestTimeConfig) -> dict[int, Setting]:
        """The spectrum of each length on its own, by length.

        Raises:
            UserError: from a method that does not fit, or a length beyond what its spectrum is defined for.
        """
        return {n: settings_by_length(self.position, self.config.rope, test_time, [n])[0] for n in lengths}

    def load(self, setting: Setting, length: int, device: str) -> Any:
        """The model, a stock transformers one, under a setting's spectrum at ``length`` tokens."""
        return load_for_evaluation(
            self.directory, extra=setting.extra, length=length, dtype=self.config.dtype, device=device
        )

    def columns(self, setting: Setting) -> dict[str, str]:
        """The columns of the results table that every row under ``setting`` shares."""
        return {
            "run": self.run,
            "method": self.method,
            "chain": str(setting.chain),
            "test_time_scaling": scaling_name(setting, self.config.rope),
        }

    def identity(self, setting: Setting, length: int) -> dict[str, Any]:
        """Everything that a number depends on besides its task: weights, spectrum at ``length`` and number format."""
        spectrum = [setting.spectrum.inv_freq.tolist(), setting.spectrum.attention_scaling]
        begins = self._opened[1]
        return {
            "checkpoint": checkpoint_sha256(self.directory),
            "chain": str(setting.chain),
            "spectrum": sha256_of_json(spectrum),
            "length": length,
            "dtype": self.config.dtype,
            "backend": self.config.backend,
            "seed": self.config.seed,
            **({} if begins is None else {"bos": begins}),
        }

    def scaled_copy(self, target: Path, setting: Setting, length: int) -> Path:
        """:func:`scaled_copy` of its directory, with a tokenizer that begins and ends texts as its own does here."""
        scaled_copy(self.directory, target, setting, length)
        begins = self._opened[1]
        if begins is not None:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (target / name).unlink(missing_ok=True)  # a link to the original
                shutil.copyfile(self.directory / name, target / name)
            set_bos(target, begins)
        return target


def open_checkpoint(config: EvaluateConfig, *, of_vision: bool = False) -> EvaluatedCheckpoint:
    """Resolve and check the checkpoint, its tokenizer and the ways to run it.

    Args:
        config: of the evaluation.
        of_vision: it must be a model of images and videos; else of text.

    Raises:
        UserError: naming the value, the rule and the fix.
    """
    validate_engine(config)
    validate_device("device", config.device)
    directory = check_checkpoint(config.checkpoint, of_vision=of_vision)
    checkpoint = EvaluatedCheckpoint(config, directory, read_position(directory))
    _ = checkpoint.tokenizer  # read now, before any model: every suite needs it
    return checkpoint


def validate_engine(config: EvaluateConfig) -> None:
    """Raise UserError for a number format, device or backend that is not known."""
    one_of("dtype", config.dtype, ("bfloat16", "float32"))
    one_of("device", config.device, DEVICES)
    one_of("backend", config.backend, ("transformers", "vllm"))


def scaling_name(setting: Setting, rope: RopeConfig) -> str:
    """The printed test-time part of a setting's chain; the steps that the ``rope`` group appended are the method's."""
    steps = setting.extra[len(rope.chain) :]
    return str(RopeChain(steps)) if steps else "none"


def check_checkpoint(path: str, *, of_vision: bool = False) -> Path:
    """The Hugging Face directory of a checkpoint, every weight file whole; a run without an export is exported first.

    Raises:
        UserError: ``path`` is not a checkpoint or of the other kind, or a shard of it is missing or cut short.
    """
    directory = resolve_checkpoint(path, of_vision=of_vision)
    StoredWeights(directory)
    return directory


def checkpoint_sha256(directory: Path) -> str:
    """SHA-256 of a checkpoint's config, and of the record of its export and the sizes of its weights.

    Weights without such a record are sampled: another trainer's newest checkpoint often replaces the one before.
    """
    described = [directory / name for name in ("config.json", "export.json")]
    about = sampled_sha256 if not described[1].exists() else lambda path: path.stat().st_size
    weights = sorted((path.name, about(path)) for path in directory.glob("*.safetensors"))
    return sha256_of_json([[path.read_text(encoding="utf-8") for path in described if path.exists()], weights])


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer beside a checkpoint.

    Raises:
        UserError: there is none, or it has tokens that the model has no embedding for.
    """
    try:
        tokenizer = open_tokenizer(directory, "checkpoint")
    except UserError as error:
        raise UserError(
            f"checkpoint={directory} has no tokenizer that transformers reads; copy the files of the one it "
            f"was trained with (tokenizer.json, tokenizer_config.json) into it: {error}"
        ) from error
    vocab_size = read_config(directory, key="checkpoint").get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer of checkpoint={directory} has {len(tokenizer)} tokens, but the model embeds "
            f"{vocab_size}; put the tokenizer that the model was trained with beside it"
        )
    return tokenizer


def scaled_copy(directory: Path, target: Path, setting: Setting, length: int) -> Path:
    """Links to the files of ``directory`` in ``target``, and a config.json compiled for ``setting`` at ``length``.

    For engines that read nothing but files. The entry is written as an export's is, in both forms: an engine's own
    transformers of version 4 would take base 10,000 and no scaling from the new form alone. Our metadata is left out,
    because it would describe the checkpoint without the scaling.

    Args:
        directory: Hugging Face directory.
        target: directory, made if absent.
        setting: spectrum of the length.
        length: tokens that the copy serves at least.
    """
    config = read_config(directory, key="checkpoint")
    position = position_of(config)
    config = place_portable(config, position, max(config.max_position_embeddings, length), setting.extra, length)
    delattr(config, METADATA_KEY)
    target.mkdir(parents=True, exist_ok=True)
    for file in directory.iterdir():
        link = target / file.name
        if file.name != "config.json" and file.is_file():
            link.unlink(missing_ok=True)  # of another checkpoint, maybe
            link.symlink_to(file.resolve())
    write_portable_config(config, target)
    write_atomically(target / "scaling.txt", f"{setting.chain} at {length} tokens\n")
    return target
