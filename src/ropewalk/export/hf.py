"""A training checkpoint as a Hugging Face directory that stock transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from ropewalk.config import ExportConfig, one_of
from ropewalk.export.zero_weights import ZeroWeights
from ropewalk.files import write_atomically
from ropewalk.rope.position import METADATA_KEY
from ropewalk.training.checkpoint import MANIFEST, find_checkpoint, read_manifest

SOURCE = "export.json"  # which checkpoint an export came from; written last
SHARD_SIZE = "2GB"


def export(config: ExportConfig) -> Path:
    """Export as ``config`` says, verify, and print what was found; returns the directory.

    Raises:
        ValueError: where there is no committed checkpoint, or the output is not empty and may not be replaced.
        RuntimeError: where stock transformers does not reproduce the checkpoint's logits.
    """
    from ropewalk.export.verify import verify_export

    if config.dtype is not None:
        one_of("dtype", config.dtype, ("bfloat16", "float32", "float16"))
    checkpoint = committed_checkpoint(config.checkpoint)
    output = Path(config.output) if config.output else run_of(checkpoint) / "export"
    if _is_current(output, checkpoint, config.dtype) and not config.overwrite:
        print(f"{output} holds this checkpoint already")
    else:
        write_export(checkpoint, output, config.dtype, overwrite=config.overwrite)
        print(f"exported {checkpoint} to {output}")
    if config.verify:
        print(verify_export(checkpoint, output))
    return output


def resolve_checkpoint(path: str | Path) -> Path:
    """A Hugging Face directory for what a user names: one already, or a training checkpoint or run, exported first.

    A run's own ``export`` serves where it is of that checkpoint and is never replaced; any other checkpoint is exported
    once, to ``<run>/exports/<step>``.

    Raises:
        ValueError: where ``path`` is none of the three.
    """
    path = Path(path)
    if (path / "config.json").is_file() and not (path / MANIFEST).exists() and list(path.glob("*.safetensors")):
        return path
    checkpoint = committed_checkpoint(path)
    run = run_of(checkpoint)
    if _is_current(run / "export", checkpoint, None):
        return run / "export"
    output = run / "exports" / checkpoint.name
    if not _is_current(output, checkpoint, None):
        write_export(checkpoint, output, None, overwrite=False)
    return output


def committed_checkpoint(path: str | Path) -> Path:
    """The committed checkpoint that ``path`` is, or the newest of the run that it is."""
    path = Path(path)
    if (path / MANIFEST).is_file() and (path / "zero").is_dir():
        return path
    found = find_checkpoint(path)
    if found is None:
        raise ValueError(
            f"{path} is neither a run directory with a committed checkpoint, nor a checkpoint, nor a Hugging Face "
            "directory with safetensors; name one of these"
        )
    return found


def run_of(checkpoint: Path) -> Path:
    """The run directory that a checkpoint lies in: <run>/checkpoints/step-N."""
    return checkpoint.resolve().parents[1]


def write_export(checkpoint: Path, output: Path, dtype: str | None, *, overwrite: bool) -> None:
    """Write weights (safetensors), config.json, generation_config.json and the tokenizer.

    They are written beside, in ``<output>.partial``, and renamed when whole.

    Args:
        checkpoint: committed training checkpoint.
        output: directory; made anew.
        dtype: of the weights; None keeps the dtype that was trained in.
        overwrite: whether an earlier export there may be replaced.

    Raises:
        ValueError: where ``output`` holds files and may not be replaced.
    """
    _check_replaceable(output, overwrite)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    partial.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text())
    config["dtype"] = dtype or config["dtype"]
    weights = ZeroWeights(checkpoint, tied=bool(config.get("tie_word_embeddings")))
    _write_weights(weights, partial, getattr(torch, config["dtype"]))
    special = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None
    }
    write_atomically(partial / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_atomically(partial / "generation_config.json", json.dumps(special, indent=2) + "\n")
    tokenizer = run_of(checkpoint) / "tokenizer"
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
    else:
        print(f"no tokenizer in {tokenizer.parent}: the export has none, add one before serving it")
    write_atomically(partial / SOURCE, json.dumps(_source(checkpoint, config["dtype"]), indent=2) + "\n")
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)


def _check_replaceable(output: Path, overwrite: bool) -> None:
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{output} is not empty; name another output or allow it with overwrite=true")
    if not (output / SOURCE).exists():
        raise ValueError(f"{output} is not an earlier export, so it is not replaced; name another output")


def _write_weights(weights: ZeroWeights, output: Path, dtype: torch.dtype) -> None:
    """One shard in memory at a time."""
    planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in weights.shapes().items()}
    split = split_torch_state_dict_into_shards(
        planned, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: weights[name].to(dtype) for name in names}, output / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_atomically(output / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _source(checkpoint: Path, dtype: str) -> dict[str, object]:
    manifest = read_manifest(checkpoint)
    metadata = json.loads((checkpoint / "config.json").read_text())[METADATA_KEY]
    return {
        "step": manifest["step"],
        "chain_sha256": metadata["chain_sha256"],
        "dtype": dtype,
        "files": manifest["files"],
    }


def _is_current(output: Path, checkpoint: Path, dtype: str | None) -> bool:
    """Whether ``output`` was exported from exactly this checkpoint, in this dtype (None: in any)."""
    if not (output / SOURCE).is_file():
        return False
    present = json.loads((output / SOURCE).read_text())
    return present == _source(checkpoint, dtype or present["dtype"])
