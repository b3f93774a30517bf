"""Evaluation: ``scripts/evaluate.py``, ``scripts/compare.py`` and ``scripts/dashboard.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from ropewalk.config.groups import AnswersConfig, ModelPath, NeedleConfig, PathsConfig, RopeConfig, TestTimeConfig


@dataclass
class HelmetConfig:
    """A HELMET checkout of the user's own, and how it reaches the model."""

    checkout: str | None = None  # directory with HELMET's eval.py
    python: str = "python"  # of the environment that HELMET's requirements are installed in
    data: str | None = None  # directory of its data; null: <checkout>/data
    endpoint: str | None = None  # URL of an OpenAI-compatible server with the model; null: in process
    attention: str = "sdpa"  # of the in-process model; HELMET's own default is flash_attention_2
    arguments: list[str] = field(default_factory=list)  # more of eval.py's own, such as --no_cuda


@dataclass
class SuiteConfig:
    """A set of measurements: one harness and its tasks, or several suites in a row."""

    name: str = "quick"
    harness: str = "quick"  # quick, ruler, lm_eval, helmet, vniah, or suites
    suites: list[str] = field(default_factory=list)  # of the harness `suites`: other files of configs/suite
    tasks: list[str] = field(default_factory=list)  # names of the harness
    few_shot: dict[str, int] = field(default_factory=dict)  # by task; a task that is not named keeps its own
    lengths: list[int] = field(
        default_factory=lambda: [8192, 16384, 32768, 65536, 131072]
    )  # what `lengths` is unless set
    needs_length: bool = True  # whether tasks are run at each of `lengths`, or once, at what they ask for
    samples: int | None = None  # of each task and length; null: all there are (ruler: 500, as published)
    overflow: str = "error"  # a prompt longer than the length: error, or middle (cut there, and counted)
    data: str | None = None  # directory of offline data (scripts/fetch_eval_data.sh); null: the hub
    averages: dict[str, list[str]] = field(default_factory=dict)  # name -> tasks that it is over
    metrics: dict[str, str] = field(default_factory=dict)  # by task, the metric that averages and comparisons take
    strata: list[str] = field(default_factory=list)  # of lm-eval's tasks, those scored by length of prompt too
    datasets: dict[str, Any] = field(default_factory=dict)  # by task, fields of its lm-eval configuration
    unscaled_too: bool = False  # past the trained length also without test-time scaling
    published: str | None = None  # csv of published numbers, set beside those measured
    helmet: HelmetConfig = field(default_factory=HelmetConfig)


@dataclass
class VniahConfig:
    """V-NIAH, of ``suite=vniah``: a needle frame at a depth of a video, and a question about it."""

    data: str | None = None  # directory that `data_prep/prepare_video.py vniah` wrote
    frames: list[int] = field(default_factory=lambda: [100, 300, 500, 1000, 2000, 3000])  # of a video, the needle's too
    depths: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8])  # share of the video before it
    samples: int = 5  # prompts of a cell; the needles come in turn
    questions: list[str] = field(default_factory=lambda: ["content", "when"])  # what it shows; in which quarter it is
    factors: list[float] = field(default_factory=list)  # positions a frame takes; []: the chain's own, of several the
    # middle one. They need positions=diagonal (HoPE, VideoRoPE).
    distractors: int = 0  # other frames like the needle, at random places
    embeddings: str | None = None  # file that the tower's output is kept in, for models that share a frozen tower


@dataclass
class EvaluateConfig:
    """``python scripts/evaluate.py``."""

    checkpoint: str = MISSING  # Hugging Face directory, training checkpoint or run directory
    name: str | None = None  # of the run in the results; null: the checkpoint's run name
    output: str = MISSING  # directory
    # of suite=quick: held-out documents, a directory that prepare.py wrote, or one of text files
    documents: str | None = None
    lengths: list[int] = MISSING  # tokens
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    seed: int = 0
    device: str = "cuda"  # cuda, cpu, or auto: the layers over all GPUs of one process, for a model too large for one
    dtype: str = "bfloat16"
    backend: str = "transformers"  # or vllm, for generation
    prefill_chunk: int | None = None  # tokens of one forward pass over a long prompt; null: chosen by its length
    max_documents: int | None = None
    overwrite: bool = False  # replace an evaluation of other settings in `output`
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    vniah: VniahConfig = field(default_factory=VniahConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)  # applied to the checkpoint's own chain, without training
    test_time: TestTimeConfig = field(default_factory=TestTimeConfig)
    test_times: list[str] = field(default_factory=list)  # more of them, by name; test_time=[auto,none] sets both
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class KeyTokensConfig:
    """``python scripts/evaluate.py key_tokens``: the tokens that LongPPL is over, chosen once for all arms."""

    checkpoint: str = MISSING  # the reference: the model that all arms start from; as in EvaluateConfig
    documents: str = MISSING  # as in EvaluateConfig; key_tokens.json is written there
    length: int = MISSING  # tokens of the long context: the longest one that arms are evaluated at
    short: int = 4096  # tokens of the short context
    max_documents: int | None = None
    device: str = "cuda"
    dtype: str = "bfloat16"
    overwrite: bool = False  # choose again: numbers over other tokens do not compare
    test_time: TestTimeConfig = field(default_factory=TestTimeConfig)  # of the reference, past its trained length
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class GenerateConfig:
    """``python scripts/generate.py``."""

    checkpoint: str = MISSING  # Hugging Face directory, training checkpoint or run directory
    prompt: str = MISSING  # text to go on from
    max_new_tokens: int = 64
    chat: bool = False  # the prompt is a user's turn in the tokenizer's chat template
    device: str = "cuda"  # as in EvaluateConfig
    dtype: str = "bfloat16"
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
    overwrite: bool = False  # replace arms of other settings in `output`
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class CompareConfig:
    """``python scripts/compare.py``."""

    runs: list[str] = MISSING  # run directories, each with its evaluation beside it
    baseline: str | None = None  # run that differences are taken to; null: the first
    published: str | None = None  # csv of published numbers (a recipe's expected.csv), set beside the runs
    base: str | None = None  # the model before continued pretraining, a directory; null: found from model.path
    output: str = MISSING  # report.html
    title: str = "ropewalk report"
    effective_needle: float = 85.0  # percent of exact match that a length must reach to count as effective context
    effective_ruler: float = 85.6  # percent, RULER average: that of Llama-2-7B at 4k tokens (arXiv 2404.06654)
    figures: str | None = None  # directory for every figure as a file of its own, by matplotlib; null: none
    figure_formats: list[str] = field(default_factory=lambda: ["png", "pdf"])  # png, pdf or svg
    track: bool = False  # log evaluations and figures into the runs of each run's tracker
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class DashboardConfig:
    """``python scripts/dashboard.py``."""

    project: str = MISSING  # of W&B: tracker.project of the runs
    entity: str | None = None  # user or team; null: the account's own
    title: str = "Position methods"
    output: str = MISSING  # directory for workspace.json and report.json
    push: bool = False  # save both to W&B; --push is the same
    paths: PathsConfig = field(default_factory=PathsConfig)
