"""A Hugging Face directory as stock transformers reads it: its config and weights, a fault of the files in one line."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from ropewalk.errors import UserError, in_one_line, warn_once
from ropewalk.files import inside
from ropewalk.rope.advisor import config_warnings
from ropewalk.rope.hf_config import modern, naming, read_config_json
from ropewalk.rope.position import position_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {  # of safetensors; float8, which quantized weights are kept in, is not read
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# What transformers raises of a user's files: num_key_value_heads of 0 is a division by it
_REFUSALS = (
    RuntimeError, SafetensorError, OSError, ImportError, ValueError, LookupError, TypeError, ArithmeticError,
    AttributeError, AssertionError,
)  # fmt: skip
_LFS_POINTER = b"version https://git-lfs"


def read_config(
    model: str | Path, *, key: str = "model", revision: str | None = None, needs_chain: bool = True
) -> PreTrainedConfig:
    """The config of a Hugging Face directory or hub id; its position is read first, its code never run.

    Args:
        model: directory, config.json or hub id.
        key: of the configuration that names it, for errors.
        revision: of a hub id.
        needs_chain: refuse a position that no chain expresses.

    Raises:
        UserError: for a position that no chain expresses, a model type that transformers lacks, or a value that it
            refuses.
    """
    content = read_config_json(model, key, revision)
    model_type = content.get("model_type")
    if model_type not in CONFIG_MAPPING:
        code = "; its own code (auto_map) is never run" if "auto_map" in content else ""
        raise UserError(
            f"{key}={model}: config.json has model_type={model_type!r}, which transformers {transformers.__version__} "
            f"does not know{code}: use a model of a type that it knows"
        )
    fault: UserError | None = None
    try:
        with naming(model, key):
            position_of(content)  # its errors name the key of the file, the rule and the fix
    except UserError as error:
        fault = error
        if needs_chain:
            raise
    try:
        config = CONFIG_MAPPING[model_type].from_dict(modern(content))
    except Exception as error:  # whatever its classes make of a user's file
        raise fault or UserError(
            f"{key}={model}: transformers refuses its config.json: {in_one_line(error)}"
        ) from error
    config.name_or_path = str(model)
    if fault is None:
        for warning in config_warnings(content):
            warn_once(f"{key}={model}: {warning}")
    return config


def auto_class(config: PreTrainedConfig) -> Any:
    """transformers' class that builds a model with this config: a causal one, or one of images, videos and text."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def check_causal(config: PreTrainedConfig, also: Collection[str] = ()) -> None:
    """Raise UserError for a config of another kind of model, or of quantized weights.

    Args:
        config: of the model.
        also: further model types that may be.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and config.model_type not in also:
        raise UserError(
            f"{config.name_or_path}: model_type={config.model_type} is not a causal language model by itself; save its "
            "language model alone (save_pretrained) and name that directory"
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise UserError(
            f"{config.name_or_path}: its weights are quantized (quantization_config: {method}); name the model that it "
            "was made from"
        )


def check_generation(directory: Path) -> None:
    """Raise UserError for a generation_config.json, which transformers reads with a model, that is not an object."""
    file = directory / "generation_config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({in_one_line(error)}); correct it, or delete it") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object; correct it, or delete it")


def load_whole(path: str | Path, **options: Any) -> PreTrainedModel:
    """A checkpoint's model; transformers by itself would fill missing weights with random ones.

    Args:
        path: Hugging Face directory or hub id.
        options: of from_pretrained, config among them.

    Raises:
        UserError: for files that cannot be read, or weights that are missing or have other shapes than in the config.
    """
    directory = Path(path)
    has_weights = any(directory.glob("*.safetensors")) or (directory / INDEX).is_file()
    stored = StoredWeights(directory) if has_weights else None  # names the file that is damaged
    check_generation(directory)
    try:
        model, info = auto_class(options["config"]).from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
        )
    except UserError:
        raise
    except _REFUSALS as error:
        # under ZeRO-3 transformers reports no mismatched keys
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        mismatch = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        fault = f"does not fit its own config: {mismatch}" if mismatch else f"cannot be read: {in_one_line(error)}"
        raise UserError(f"{path} {fault}") from error
    missing, misshapen = sorted(info["missing_keys"]), sorted(name for name, *_ in info["mismatched_keys"])
    faults = (
        ("lacks", missing),
        ("has in other shapes than its config.json says:", misshapen),
        ("has as integers, as quantized weights are kept:", [] if stored is None else _integers(model, stored)),
    )
    for fault, names in faults:
        if names:
            raise UserError(
                f"{path} {fault} {', '.join(names[:3])} ({len(names)} weights in all); copy it again, whole, with the "
                "config.json that belongs to it"
            )
    return model


def _integers(model: PreTrainedModel, stored: StoredWeights) -> list[str]:
    """Weights kept as integers, which transformers would take for the numbers themselves."""
    names = (name for name, _ in model.named_parameters())
    return [name for name in names if name in stored and not stored.dtypes[name].is_floating_point]


class Weights(Mapping[str, Tensor]):
    """Weights by name, none of them in memory until it is looked up.

    Attributes:
        shapes: of each weight.
        dtypes: of each weight as it is kept.
    """

    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def gather(self, name: str, dtype: torch.dtype) -> Tensor:
        """One weight in ``dtype``."""
        return self[name].to(dtype)

    def without(self, names: Collection[str]) -> Self:
        """The same without these."""
        self.shapes = {name: shape for name, shape in self.shapes.items() if name not in names}
        return self


class StoredWeights(Weights):
    """The weights of a Hugging Face directory under the names that stand there; each look-up reads that one."""

    def __init__(self, directory: Path) -> None:
        """Open the safetensors files of ``directory``; nothing is read yet.

        Raises:
            UserError: where there are none, or a file is missing or damaged.
        """
        self._open(weight_files(directory))

    @classmethod
    def of(cls, files: list[Path]) -> StoredWeights:
        """The weights of these files."""
        weights = cls.__new__(cls)
        weights._open(files)
        return weights

    def _open(self, files: list[Path]) -> None:
        self.shapes, self.dtypes = {}, {}
        self._files: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - it is not a mapping
                        part = opened.get_slice(name)
                        if name in self._files:
                            self._check_alike(name, self._files[name], file)
                        self._files[name], self.shapes[name] = file, torch.Size(part.get_shape())
                        self.dtypes[name] = _DTYPES[part.get_dtype()]
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} {_damage(file, error)}") from error
            except KeyError as error:
                raise UserError(f"{file} has weights of dtype {error}; use one of: {', '.join(_DTYPES)}") from None

    @staticmethod
    def _check_alike(name: str, *files: Path) -> None:
        """Raise UserError where two files have different weights of one name: engines take either."""
        if not torch.equal(*(_weight(file, name) for file in files)):
            raise UserError(
                f"{files[0]} and {files[1].name} both have {name}, and differ; delete the file that is not the model's"
            )

    def __getitem__(self, name: str) -> Tensor:
        return _weight(self._files[name], name)


def _weight(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def _damage(file: Path, error: Exception) -> str:
    try:
        with file.open("rb") as opened:
            if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return "is a Git LFS pointer, not the weights; fetch them (git lfs pull)"
    except OSError:
        pass  # the first error says why
    return f"cannot be read ({in_one_line(error)}); copy it anew"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the model in ``directory``, in order; a single file comes before an index.

    That is transformers' order. Where both are there, they must be the same model.

    Raises:
        UserError: where there are none, one that the index names is missing, or the single file differs from the
            shards.
    """
    index, single = directory / INDEX, directory / SINGLE
    if not index.is_file():
        if not single.is_file():
            raise UserError(
                f"{directory} holds no {SINGLE} and no {INDEX}; weights are read from safetensors alone (pickled .bin "
                "files are not opened): convert them with transformers' save_pretrained"
            )
        return [single]
    files = _indexed(index)
    missing = [file.name for file in files if not file.is_file()]
    if not single.is_file():
        if missing:
            raise UserError(f"{directory}: {INDEX} names {', '.join(missing)}, not there; copy them, or download again")
        return files
    if not missing and files != [single] and (name := _difference(StoredWeights.of([single]), StoredWeights.of(files))):
        raise UserError(
            f"{directory} holds {SINGLE} beside the shards of {INDEX}, and they differ in {name}; transformers loads "
            f"{SINGLE}, other engines the shards: delete the one that is not the model"
        )
    return [single]


def _indexed(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted({inside(index.parent, name, links=True) for name in names})
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of weights ({in_one_line(error)}); copy it anew") from error


def _difference(weights: StoredWeights, others: StoredWeights) -> str | None:
    """The first weight that is not the same in both; None: they are equal."""
    for name in sorted(weights.keys() | others.keys()):
        if name not in weights or name not in others or not torch.equal(weights[name], others[name]):
            return name
    return None


@dataclass(frozen=True)
class WeightReport:
    """The use that stock transformers makes of the weights of a directory.

    Attributes:
        faults: weights that are missing or have another shape, in words.
        copies: names of stored copies of a tied weight, which it ties.
        unread: names that it does not read.
    """

    faults: tuple[str, ...]
    copies: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def weight_report(directory: Path, config: PreTrainedConfig) -> WeightReport:
    """The weights that stock transformers loads from ``directory``; it is asked itself, on the meta device.

    Raises:
        UserError: where it cannot be read at all.
    """
    # here, since ropewalk.guard loads this module and needs no configuration
    from ropewalk.config.train import VISION_MODEL_TYPES

    stored = StoredWeights(directory)
    check_causal(config, also=VISION_MODEL_TYPES)
    check_generation(directory)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its own report of the same
    try:
        model, info = auto_class(config).from_pretrained(
            directory, config=config, output_loading_info=True, ignore_mismatched_sizes=True, device_map="meta",
            attn_implementation="eager",
        )  # fmt: skip
    except _REFUSALS as error:
        raise UserError(f"{directory} cannot be loaded by transformers: {in_one_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(level)
    missing, misshapen = sorted(info["missing_keys"]), sorted(name for name, *_ in info["mismatched_keys"])
    faults = [f"{len(missing)} weights are missing, {missing[0]} first"] if missing else []
    faults += [f"{len(misshapen)} weights have other shapes, {misshapen[0]} first"] if misshapen else []
    integers = _integers(model, stored)
    faults += [f"{len(integers)} weights are integers, as if quantized, {integers[0]} first"] if integers else []
    tied = {target: source for target, source in model.all_tied_weights_keys.items() if {target, source} <= set(stored)}
    faults += [
        f"{target} is stored beside {source} and differs from it, though tie_word_embeddings is true (transformers "
        "then leaves them apart, other engines do not): set tie_word_embeddings to false in its config.json, or delete "
        f"the copy from its file"
        for target, source in tied.items()
        if stored.shapes[target] != stored.shapes[source] or not torch.equal(stored[target], stored[source])
    ]
    unread = sorted(name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq"))
    return WeightReport(tuple(faults), tuple(sorted(tied)), tuple(unread))


def weight_faults(directory: Path, config: PreTrainedConfig) -> Iterator[str]:
    """The faults of :func:`weight_report`, in words, also where the weights cannot be read."""
    try:
        yield from weight_report(directory, config).faults
    except UserError as error:
        yield str(error)
