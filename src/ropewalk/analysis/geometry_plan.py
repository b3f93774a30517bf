"""Plan of a geometry run, checked before a model is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ropewalk.analysis.statistics import sample_heads
from ropewalk.config.analysis import GeometryConfig
from ropewalk.config.groups import RopeConfig, TestTimeConfig
from ropewalk.config.rules import existing_directory, one_of, validate_device
from ropewalk.errors import UserError
from ropewalk.evaluation.documents import Windows, make_windows, validate_lengths
from ropewalk.evaluation.evaluated_checkpoint import Setting, load_tokenizer, settings_by_length
from ropewalk.evaluation.results import writable_directory
from ropewalk.export import resolve_checkpoint
from ropewalk.export.gguf.gguf_model import FAMILIES
from ropewalk.figures.figure import check_formats
from ropewalk.model.hf_directory import check_causal, read_config
from ropewalk.model.load import head_dim, read_position
from ropewalk.runs.directory import run_name

RECORD = "geometry.json"
MEASURED_TYPES = (*FAMILIES, "olmo3")  # what export.py model= converts


@dataclass(frozen=True)
class Subject:
    """One checkpoint: its label, its directory, and which lengths run under which spectrum.

    A chain that does not depend on the input's length has one setting, so one pass a document; one that does has a
    pass for each length.
    """

    name: str
    directory: Path
    settings: list[Setting]


@dataclass(frozen=True)
class Shape:
    """Shape that checkpoints side by side must share."""

    layers: int
    heads: int
    key_heads: int
    head_dim: int


@dataclass(frozen=True)
class Plan:
    """Everything that a geometry run measures.

    Attributes:
        config: as given.
        subjects: checkpoints, in the order of ``models``.
        shape: of all of them.
        layers: to measure, ascending.
        map_heads: (layer, query head) whose attention map is drawn.
        pca_heads: (layer, key head) of the PCA snapshots.
        windows: the documents, each as many tokens as the longest length.
        output: directory.
    """

    config: GeometryConfig
    subjects: list[Subject]
    shape: Shape
    layers: list[int]
    map_heads: list[tuple[int, int]]
    pca_heads: list[tuple[int, int]]
    windows: Windows
    output: Path


def make_plan(config: GeometryConfig) -> Plan:
    """Check the configuration, read the models' configs and tokenize the documents.

    Raises:
        UserError: naming the value, the rule and the fix.
    """
    _validate(config)
    documents = existing_directory("documents", config.documents, "write one with data_prep/prepare.py")
    _check_unused(config)
    directories = {run_name(model): resolve_checkpoint(model) for model in _distinct(config.models)}
    shape = _shared_shape(directories)
    layers = _layers(config, shape)
    return Plan(
        config=config,
        subjects=[Subject(name, path, _settings(path, config.lengths)) for name, path in directories.items()],
        shape=shape,
        layers=layers,
        map_heads=[_map_head(text, layers, shape) for text in config.attention_heads],
        pca_heads=sample_heads(layers, shape.key_heads, config.pca_heads, config.seed),
        windows=_shared_windows(directories, documents, config),
        output=writable_directory("output", config.output),
    )


def _validate(config: GeometryConfig) -> None:
    if not config.models:
        raise UserError("models=[] names no checkpoint; name one or more directories")
    validate_lengths(config.lengths)
    for name, least in (("max_documents", 1), ("pca_heads", 0), ("cluster_samples", 2), ("seed", 0)):
        if getattr(config, name) < least:
            raise UserError(f"{name}={getattr(config, name)} must be {least} or more")
    if config.formats:
        check_formats("formats", config.formats)
    one_of("dtype", config.dtype, ("bfloat16", "float32"))
    one_of("device", config.device, ("cuda", "cpu"))
    validate_device("device", config.device)


def _check_unused(config: GeometryConfig) -> None:
    if (Path(config.output) / RECORD).exists() and not config.overwrite:
        raise UserError(
            f"output={config.output} holds a geometry already; name another, or replace it with overwrite=true"
        )


def _distinct(models: list[str]) -> list[str]:
    labels = [run_name(model) for model in models]
    if len(set(labels)) < len(labels):
        raise UserError(
            f"models={models} are named {labels} in the figures, some alike; reach one through a symbolic link of "
            "another name"
        )
    return models


def _settings(directory: Path, lengths: list[int]) -> list[Setting]:
    return settings_by_length(read_position(directory), RopeConfig("native"), TestTimeConfig("none"), lengths)


def _shared_shape(directories: dict[str, Path]) -> Shape:
    shapes = {name: _shape(path) for name, path in directories.items()}
    first = next(iter(shapes.values()))
    for name, shape in shapes.items():
        if shape != first:
            raise UserError(
                f"models: {name} has {shape} and {next(iter(shapes))} has {first}; checkpoints are compared head by "
                "head, so measure differently shaped ones in runs of their own"
            )
    return first


def _shape(directory: Path) -> Shape:
    config = read_config(directory)
    check_causal(config)
    one_of(f"model_type of {directory}", config.model_type, MEASURED_TYPES)
    heads = config.num_attention_heads
    return Shape(config.num_hidden_layers, heads, config.num_key_value_heads, head_dim(config))


def _layers(config: GeometryConfig, shape: Shape) -> list[int]:
    if config.layers is None:
        return list(range(shape.layers))
    if not config.layers or not all(0 <= layer < shape.layers for layer in config.layers):
        raise UserError(
            f"layers={config.layers} must be within 0..{shape.layers - 1} of the model; name some, or null for all"
        )
    return sorted(set(config.layers))


def _map_head(text: str, layers: list[int], shape: Shape) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    if match is None:
        raise UserError(f"attention_heads={text} is not LAYER.HEAD; write one like '3.10', in quotes")
    layer, head = int(match[1]), int(match[2])
    if layer not in layers or head >= shape.heads:
        raise UserError(
            f"attention_heads={text}: the layer must be one of the measured {layers}, and the head within "
            f"0..{shape.heads - 1}"
        )
    return layer, head


def _shared_windows(directories: dict[str, Path], documents: Path, config: GeometryConfig) -> Windows:
    """The documents' tokens, which must be the same for all checkpoints."""
    by_label = {
        name: make_windows(documents, load_tokenizer(path), config.lengths[-1], config.max_documents)
        for name, path in directories.items()
    }
    first, windows = next(iter(by_label.items()))
    for name, other in by_label.items():
        same = windows.tokens.keys() == other.tokens.keys()
        if not same or not all(torch.equal(ids, other.tokens[of]) for of, ids in windows.tokens.items()):
            raise UserError(
                f"models: {name} and {first} read the documents as different tokens; checkpoints side by side need "
                "one tokenizer"
            )
    return windows
