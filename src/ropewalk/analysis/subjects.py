"""Subjects of an analysis: a model's position facts and the chains to compare, as users name them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from ropewalk.config import CONFIG_DIR
from ropewalk.config.analysis import FiguresConfig
from ropewalk.errors import UserError
from ropewalk.rope import Position, RopeChain, Spectrum
from ropewalk.rope.position import declared_position


def is_declared(model: str) -> bool:
    """True if ``model`` is a name in configs/model."""
    return _shipped("model", model).is_file()


def declared_path(name: str) -> str | None:
    """The checkpoint that a name in configs/model stands for; None for one that is built from scratch."""
    groups = {"model": _shipped("model", name), "paths": _shipped("paths", "default")}  # a path may name paths.data_dir
    return OmegaConf.create({group: OmegaConf.load(file) for group, file in groups.items()}).model.path


def locate(model: str) -> Path | str:
    """The directory or file that holds a model's config.json; a hub id as it stands.

    A run directory gives its newest committed checkpoint.
    """
    path = Path(model)
    if not path.is_dir() or (path / "config.json").is_file():
        return path if path.exists() else model
    from ropewalk.export.source import committed_checkpoint  # whose config.json is enough: nothing is exported

    return committed_checkpoint(model)


def read_model(model: str) -> Position:
    """How a model rotates, from a directory, its config.json, a hub id, a run, or a name in configs/model.

    A name in configs/model gives the facts declared there; nothing is loaded.
    """
    if not is_declared(model):
        return Position.from_pretrained(locate(model))
    facts = OmegaConf.load(_shipped("model", model))
    architecture = OmegaConf.to_container(facts.architecture) if "architecture" in facts else {}
    return declared_position(
        float(facts.theta),
        int(facts.head_dim),
        int(facts.pretrained_length),
        dict(architecture),  # type: ignore[arg-type]
    )


def read_chains(methods: Sequence[str]) -> dict[str, RopeChain]:
    """Chains by label: ``cope20`` (a name in configs/rope), ``abf(theta=1e7) > cope(clip=20)``, ``LABEL: chain``.

    Raises:
        UserError: for a chain that cannot be read, or a label that is given twice.
    """
    chains: dict[str, RopeChain] = {}
    for method in methods:
        label, colon, text = (part.strip() for part in method.partition(":"))
        if label in chains:
            raise UserError(
                f"methods={list(methods)} has the label {label!r} twice, and one would hide the other; drop one, or "
                f"give it a label of its own: 'LABEL: {text or label}'"
            )
        shipped = _shipped("rope", text if colon else label)
        if shipped.is_file():
            steps = OmegaConf.to_container(OmegaConf.load(shipped).chain)
            chains[label] = RopeChain(steps)  # type: ignore[arg-type]
        else:
            chains[label] = RopeChain.parse(text if colon else label)
    return chains


def _shipped(group: str, name: str) -> Path:
    """The file of a name in a config group; a path is not a name."""
    return CONFIG_DIR / group / (f"{name}.yaml" if name.isidentifier() else "")


def spectra_of(config: FiguresConfig) -> dict[str, Spectrum]:
    """The spectrum of each method that a figure compares, by label, for a run at ``train_length`` tokens.

    As in training, a method follows the model's own chain, or replaces it where it lays the spectrum out anew. A label
    names the layers that do not rotate, since the figures are of the others, or the factor on queries.
    """
    model, spectra = read_model(config.model.path), {}
    for label, chain in read_chains(config.methods).items():
        spectrum = model.continued(label, chain, config.train_length).spectrum()
        beside = spectrum.layers or spectrum.temperature  # a chain has one of them at most
        spectra[f"{label} ({beside})" if beside else label] = spectrum
    return spectra
