"""Evaluation: ``scripts/evaluate.py`` and ``scripts/compare.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from ropewalk.config.groups import ModelPath, PathsConfig, RopeConfig, TestTimeConfig


@dataclass
class NeedleConfig:
    """The passkey grid."""

    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])  # share of the context
    samples: int = 4  # prompts per cell; 0: no grid
    digits: int = 5  # of the key
    distractors: int = 0  # other facts in the haystack


@dataclass
class EvaluateConfig:
    """``python scripts/evaluate.py``."""

    checkpoint: str = MISSING  # Hugging Face directory, training checkpoint or run directory
    name: str | None = None  # of the row in the results; null: the checkpoint's run name
    output: str = MISSING  # directory
    documents: str = MISSING  # held-out documents: a directory that prepare.py wrote, or one of text files
    lengths: list[int] = MISSING  # tokens
    seed: int = 0
    device: str = "cuda"
    dtype: str = "bfloat16"
    max_documents: int | None = None
    overwrite: bool = False  # replace an evaluation of other settings in `output`
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)  # applied to the checkpoint's own chain, without training
    test_time: TestTimeConfig = field(default_factory=TestTimeConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class ValidateConfig:
    """``python scripts/evaluate.py validate``: what a change of the spectrum does to a model without training."""

    model: ModelPath = field(default_factory=ModelPath)  # Hugging Face directory, training checkpoint or run directory
    rope: RopeConfig = field(default_factory=RopeConfig)  # appended to the model's own chain; empty: the sweep alone
    documents: str = MISSING  # as in EvaluateConfig
    output: str = MISSING  # directory; every arm is an evaluation of its own below it
    multiples: list[int] = field(default_factory=lambda: [1, 2, 4])  # of the trained length, 1 first
    # Of cope, in this order; null: 10 (all pairs where there are fewer), the advisor's, half of that, and all pairs
    # whose period exceeds the trained length; []: no sweep.
    clips: list[int] | None = None
    sweep_samples: int = 1  # needle prompts per cell of the sweep, at most needle.samples; 0: no needle
    tolerance: float = 0.01  # nats per token that short context may lose
    max_documents: int | None = None
    seed: int = 0
    device: str = "cuda"
    dtype: str = "bfloat16"
    overwrite: bool = False  # measure every arm again, whatever `output` holds
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class CompareConfig:
    """``python scripts/compare.py``."""

    runs: list[str] = MISSING  # run directories, each with its evaluation beside it
    baseline: str | None = None  # run that differences are taken to; null: the first
    base: str | None = None  # the model before continued pretraining, a directory; null: found from model.path
    output: str = MISSING  # report.html
    title: str = "ropewalk report"
    effective_needle: float = 85.0  # percent of exact match that a length must reach to count as effective context
    effective_ruler: float = 85.6  # percent, RULER average: that of Llama-2-7B at 4k tokens (arXiv 2404.06654)
    figures: str | None = None  # directory for every figure as a file of its own, by matplotlib; null: none
    figure_formats: list[str] = field(default_factory=lambda: ["png", "pdf"])  # png, pdf or svg
    track: bool = False  # log evaluations and figures into the runs of each run's tracker
    paths: PathsConfig = field(default_factory=PathsConfig)
