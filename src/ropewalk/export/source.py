"""The source of an export: weights read one at a time, the position they rotate with, and their origin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig

from ropewalk.config.groups import RopeConfig, TestTimeConfig
from ropewalk.errors import UserError
from ropewalk.export.portable import place_portable
from ropewalk.export.zero_weights import ZeroWeights
from ropewalk.files import sampled_sha256, sha256_of
from ropewalk.model.carrier import carry_temperature
from ropewalk.model.hf_directory import StoredWeights, Weights, read_config, weight_files, weight_report
from ropewalk.rope import Position, RopeChain
from ropewalk.rope.chain import Steps, reached_length
from ropewalk.rope.hf_config import unreachable
from ropewalk.rope.position import position_of
from ropewalk.runs.directory import MANIFEST, ZERO, RunDirectory, checkpoint_at, read_manifest

DTYPES = {
    **{name: name for name in ("bfloat16", "float32", "float16")},
    "bf16": "bfloat16",
    "f32": "float32",
    "fp32": "float32",
    "f16": "float16",
    "fp16": "float16",
}
_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*"]


@dataclass(frozen=True)
class Source:
    """One model to export.

    Attributes:
        origin: checkpoint or model directory.
        open: opens its weights; a training checkpoint is hashed first.
        config: stock config with the exported position in it.
        position: how the export rotates.
        dtype: of the weights by default; None: each as it is kept.
        tokenizer: directory that holds one; None: there is none.
        identity: what tells this export from another of the same name.
        run_dir: of the training run; None for a model that was not trained here.
        keeps_entry: the model's own stock entry stands as it is, as nothing was appended to its chain.
    """

    origin: Path
    open: Callable[[], Weights]
    config: PreTrainedConfig
    position: Position
    dtype: str | None
    tokenizer: Path | None
    identity: dict[str, Any]
    run_dir: Path | None
    keeps_entry: bool = False


def committed_checkpoint(path: str | Path) -> Path:
    """The committed checkpoint that ``path`` is, or the newest of the run that it is."""
    path = Path(path)
    checkpoint = checkpoint_at(path)
    if checkpoint is None:
        raise UserError(f"{path} is neither {_KINDS}{_hint(path)}")
    return checkpoint


_KINDS = (
    "a run directory with a committed checkpoint, nor a checkpoint, nor a Hugging Face directory with safetensors; "
    "name one of these"
)


def _hint(path: Path) -> str:
    if RunDirectory(path).saved_checkpoints() or (path / ZERO).is_dir():
        return f" (it holds a checkpoint without {MANIFEST}: its save was cut short, or a file was not copied)"
    if list(path.glob("global_step*")) or list(path.glob("*_optim_states.pt")):
        return " (it is DeepSpeed's, of another trainer: convert it with its zero_to_fp32.py, then give model=DIR)"
    return ""


def trained_source(checkpoint: Path, test_time: Steps = ()) -> Source:
    """A committed checkpoint, with test-time steps appended to its chain.

    Raises:
        UserError: for a checkpoint that is not whole, or steps that do not fit its chain.
    """
    manifest = read_manifest(checkpoint)
    config = read_config(checkpoint, key="checkpoint")
    trained = position_of(config)
    position = trained.extended(test_time)
    config = place_portable(config, position, _served(position, config.get_text_config().max_position_embeddings))
    run = RunDirectory.of(checkpoint)
    return Source(
        origin=checkpoint,
        open=lambda: ZeroWeights(checkpoint, tied=bool(config.tie_word_embeddings)),
        config=config,
        position=position,
        dtype=str(config.dtype).removeprefix("torch."),
        tokenizer=run.tokenizer if run.tokenizer.is_dir() else None,
        identity={
            "step": manifest["step"],
            "chain_sha256": position.chain.sha256,
            "files": manifest["files"],
        },
        run_dir=run.root,
    )


def converted_source(model: str, rope: RopeConfig, test_time: Steps = ()) -> Source:
    """A Hugging Face directory or hub model, with a method applied to it without training.

    As in training, a chain that lays the spectrum out anew replaces the model's own; another follows it. Without
    either, the model's own entry stands as it is, also where it follows the input's length.

    Raises:
        UserError: for a model that cannot be read or is not whole, or a method that does not fit it.
    """
    directory = local_model(model)
    config = read_config(directory)
    if config.to_dict().get("text_config"):
        raise UserError(f"model={model} is multimodal ({config.model_type}); export its language model alone")
    report = weight_report(directory, config)
    for fault in report.faults:
        raise UserError(f"model={model} does not fit its own config.json: {fault}; copy it again, whole")
    if report.copies:
        print(f"left out: {', '.join(report.copies)}, stored beside the weight that it is tied to, and equal to it")
    if report.unread:
        names = ", ".join(report.unread[:3])
        print(f"left out: {len(report.unread)} weights that transformers does not read, {names} among them")
    position, keeps_entry = position_of(config), not (rope.chain or test_time)
    if position.temperature is not None:
        config = carry_temperature(config, position.temperature)  # vLLM's key, which Mistral's file lacks
    if not keeps_entry:
        position = position.continued(
            rope.name if rope.chain else position.name,
            RopeChain.of(rope),
            position.trained_length,
            base_model=position.base_model or (None if Path(model).is_dir() else model),
        ).extended(test_time)
        config = place_portable(config, position, _served(position, config.max_position_embeddings))
    return Source(
        origin=directory,
        open=lambda: StoredWeights(directory).without((*report.copies, *report.unread)),
        config=config,
        position=position,
        dtype=None,
        tokenizer=directory if (directory / "tokenizer_config.json").is_file() else None,
        identity={
            "model": model,
            "chain_sha256": position.chain.sha256,
            "files": {path.name: sampled_sha256(path) for path in weight_files(directory)},
            "config_sha256": sha256_of(directory / "config.json"),
            **({"entry": "as it was"} if keeps_entry else {}),
        },
        run_dir=None,
        keeps_entry=keeps_entry,
    )


def local_model(model: str) -> Path:
    """The directory of a model; one of the hub is downloaded into its cache, pickles and code left out."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise UserError(f"model={model} is not a directory; name a Hugging Face directory or a hub id")
    try:
        return Path(snapshot_download(model, allow_patterns=_MODEL_FILES))
    except OSError as error:
        raise unreachable("model", model, error) from error


def static_steps(test_time: TestTimeConfig) -> list[dict[str, Any]]:
    """The test-time steps that one checkpoint can hold: those that are the same at every length.

    Raises:
        UserError: where they differ with the input's length.
    """
    if test_time.within != test_time.beyond:
        raise UserError(
            f"test_time={test_time.name} scales inputs past the trained length alone, and a checkpoint holds one "
            "spectrum for all lengths; use test_time=none, or yarn4, which scales at every length"
        )
    return list(test_time.beyond)


def _served(position: Position, present: int) -> int:
    """Tokens that the export serves: what its scalings reach, never less than the trained length."""
    reached = reached_length(position.chain.steps, position.spectrum())
    return max(present, reached or 0)


def dtype_name(value: str | None) -> str | None:
    """The full name of a dtype; None stays.

    Raises:
        UserError: for one that is not written.
    """
    if value is not None and value not in DTYPES:
        raise UserError(f"dtype={value} is not known; use one of: {', '.join(DTYPES)}")
    return None if value is None else DTYPES[value]
