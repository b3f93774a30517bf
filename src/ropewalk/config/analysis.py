"""Analysis: the commands of ``scripts/analyze.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from ropewalk.config.groups import ModelPath, PathsConfig


@dataclass
class AdviseConfig:
    """``python scripts/analyze.py advise``."""

    model: ModelPath = field(default_factory=ModelPath)  # directory, config.json, hub id, or a name in configs/model
    theta: float | None = None  # base that the run would train at; null: the model's own
    train_length: int | None = None  # tokens that the run would train at; null: what the model was trained at
    target_length: int | None = None  # tokens to serve; null: four times the trained length
    chain: str | None = None  # a chain to judge, as text or a name in configs/rope; null: none
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class InspectConfig:
    """``python scripts/analyze.py inspect``."""

    model: ModelPath = field(default_factory=ModelPath)  # Hugging Face directory, its config.json, or hub id
    length: int | None = None  # tokens of the input, for length-dependent types; null: the trained length
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class FiguresConfig:
    """``python scripts/analyze.py spectra|kernel|...``: figures that need a spectrum and no weights."""

    methods: list[str] = MISSING  # names in configs/rope, or chains as text; "NAME: chain" names one
    model: ModelPath = field(default_factory=lambda: ModelPath("llama3_8b"))  # as in AdviseConfig
    train_length: int = 65536  # tokens
    target_length: int = 262144  # tokens
    output: str = "figures"  # directory
    formats: list[str] = field(default_factory=lambda: ["png", "pdf"])
    results: list[str] = field(default_factory=list)  # evaluated runs: the clip figure's response, all of ablations
    published: str | None = None  # csv of published numbers (a recipe's expected.csv), for ablations
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class GeometryConfig:
    """``python scripts/analyze.py geometry``: queries and keys of real checkpoints before and after RoPE."""

    models: list[str] = MISSING  # Hugging Face directories, training checkpoints or run directories
    documents: str = MISSING  # held-out documents: a directory that prepare.py wrote, or one of text files
    output: str = MISSING  # directory
    lengths: list[int] = MISSING  # tokens, ascending
    max_documents: int = 1
    layers: list[int] | None = None  # null: all
    # LAYER.HEAD whose attention map is drawn; in quotes ("3.10"), or YAML reads the number 3.1
    attention_heads: list[str] = field(default_factory=lambda: ["0.0"])
    pca_heads: int = 4  # key heads, with their queries, sampled for the PCA snapshots
    cluster_samples: int = 2048  # queries and keys each, at most, for silhouette and Davies-Bouldin
    seed: int = 0
    device: str = "cuda"
    dtype: str = "bfloat16"
    formats: list[str] = field(default_factory=lambda: ["png", "pdf"])
    overwrite: bool = False
    paths: PathsConfig = field(default_factory=PathsConfig)
