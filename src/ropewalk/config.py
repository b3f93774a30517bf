"""The typed configuration: one dataclass for each Hydra group, and the rules that no type can state.

Importing this module loads neither torch nor transformers, so composing a configuration stays fast.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import MISSING

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass
class ModelConfig:
    """The model that training starts from.

    ``theta``, ``head_dim`` and ``pretrained_length`` are declared here, so that a chain can be resolved before
    anything is loaded; they are checked against the checkpoint's own config.json when it is.
    """

    name: str = MISSING
    path: str | None = None  # hub id or Hugging Face directory; null: random weights of `architecture`
    revision: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)  # transformers config fields, where path is null
    theta: float = MISSING  # RoPE base of the pretrained model
    head_dim: int = MISSING  # channels of a head; head_dim / 2 rotary pairs
    pretrained_length: int = MISSING  # tokens


@dataclass
class RopeConfig:
    """The position method: an ordered chain of spectrum transforms."""

    name: str = MISSING
    chain: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class DataConfig:
    """Which packed stores are read, and in what proportions."""

    store: str = MISSING  # directory or URL (s3://, gs://, hf://, file://) of the packed store
    sequence_length: int = MISSING  # tokens; must equal the store's
    mixture: dict[str, float] = field(default_factory=dict)  # domain -> share of sequences; normalised
    curriculum: dict[int, dict[str, float]] = field(default_factory=dict)  # step -> the mixture from that step on
    # More stores by name; their domains are NAME/DOMAIN. Shorter sequences that divide sequence_length are joined.
    stores: dict[str, str] = field(default_factory=dict)
    verify: bool = False  # hash every file of the store before training
    cache_dir: str | None = None  # where stores behind a URL are copied to; a disk of the node
    cache_gib: float = 256.0  # what their token files may take there


@dataclass
class TrainerConfig:
    """The optimization: batch, schedule, precision, and when to save."""

    seed: int = 0
    device: str = "cuda"  # cuda or cpu
    dtype: str = "bfloat16"  # of parameters and activations: bfloat16 or float32
    max_steps: int = MISSING
    global_batch_size: int = MISSING  # sequences a step, over all ranks
    micro_batch_size: int = 1  # sequences a rank holds at once
    learning_rate: float = MISSING  # peak
    min_lr_ratio: float = 0.1  # floor of the cosine, as a share of the peak
    warmup_ratio: float = 0.1  # share of max_steps
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1  # not on norms and biases
    gradient_clipping: float = 1.0  # global norm
    activation_checkpointing: bool = True
    loss_chunk_size: int = 2048  # tokens whose logits exist at once
    log_every: int = 1  # steps
    peak_flops: float | None = None  # of one device, dense, for MFU; null: known for A100, H100 and H200 in bf16
    checkpoint_every: int | None = 250  # steps; the last step is saved too; null: nothing is saved
    keep_last: int | None = None  # newest checkpoints that are kept; null: all
    keep_every: int | None = None  # with keep_last, those at multiples of so many steps are kept too
    stop_after: int | None = None  # end this session after so many steps, saved; the schedule is untouched
    stop_before: str | None = None  # save and leave in time for this instant: seconds since 1970, or ISO 8601
    overfit_one_batch: bool = False  # every step sees step 0's batch
    profile_steps: int = 0  # steps recorded by torch.profiler into the run directory


@dataclass
class DeepSpeedConfig:
    """What of ZeRO is a choice; the rest is fixed in training/engine.py."""

    stage: int = 3
    param_persistence_threshold: int = 100_000  # parameters smaller than this stay whole on every rank
    overlap_comm: bool = True
    offload_optimizer: bool = False  # optimizer states in host memory


@dataclass
class ResumeConfig:
    """Going on from the newest committed checkpoint of the run directory."""

    enabled: bool = True  # false: a run directory that holds one is an error
    accept: list[str] = field(default_factory=list)  # contract entries that may differ, by name


@dataclass
class GuardConfig:
    """What keeps a bad step from the weights. A refused step is counted, written to refused/, and passed over."""

    max_refused: int = 3  # steps refused in a row before the run stops
    spike_window: int | None = None  # steps that a loss is compared with; null: only what is not finite is refused
    spike_deviations: float = 6.0  # above the window's median, in standard deviations (1.4826 x MAD)
    spike_action: str = "skip"  # or stop
    stuck_multiple: float = 10.0  # of the median step; a step that takes longer is reported, with every rank's stack
    stuck_seconds: float = 60.0  # and at least so long


@dataclass
class ParallelConfig:
    """How ranks share the work beside data parallelism."""

    sequence: int = 1  # neighbouring ranks that share each row of tokens (Ulysses); divides the key/value heads


@dataclass
class TrackerConfig:
    """Where metrics go beside the run's own metrics.jsonl."""

    name: str = "wandb"  # wandb, trackio or none
    project: str = "ropewalk"
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class TestTimeConfig:
    """Spectrum transforms appended for evaluation or export.

    ``original_max_position_embeddings: trained_length`` names the length that the checkpoint was trained at.
    """

    name: str = MISSING
    within: list[dict[str, Any]] = field(default_factory=list)  # at lengths up to the trained one
    beyond: list[dict[str, Any]] = field(default_factory=list)  # at lengths past it


@dataclass
class PathsConfig:
    """Roots of what is read and written."""

    data_dir: str = "data"
    output_dir: str = "outputs"


@dataclass
class TrainConfig:
    """``python train.py``."""

    run_name: str = MISSING
    run_dir: str = "${paths.output_dir}/${run_name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class SourceConfig:
    """Where documents of one domain come from."""

    domain: str = MISSING
    path: str = MISSING  # file or directory; kind=dataset: a saved dataset, or a hub id
    kind: str = "files"  # files (text, code, jsonl, parquet), repositories (one document each), dataset (Hugging Face)
    chat: bool = False  # rows are lists of messages; only what the assistant says is trained
    column: str | None = None  # of the rows; null: text, or messages where chat
    subset: str | None = None  # of a hub dataset
    split: str = "train"  # of a hub dataset
    revision: str | None = None  # commit of a hub dataset; must be given


@dataclass
class DomainConfig:
    """How the documents of one domain become sequences.

    ``long`` puts a stretch of one document into each sequence; ``short`` packs by best fit and cuts no document that
    fits; ``concat`` puts documents one after the other and cuts where a sequence is full.
    """

    packing: str = "short"  # long, short or concat
    remainder: str = "drop"  # packing=long: domain that takes what fills no sequence, or drop


@dataclass
class CorpusConfig:
    """Raw documents and how they become tokens."""

    name: str = MISSING
    stdlib: bool = False  # the running interpreter's standard library, one document per top-level package
    paths: list[str] = field(default_factory=list)  # files and directories; with stdlib: split into long and short
    sources: list[SourceConfig] = field(default_factory=list)  # documents that name their own domain
    domains: dict[str, DomainConfig] = field(default_factory=dict)  # of sources; a domain without an entry is short
    tokenizer: str | None = None  # Hugging Face tokenizer directory or hub id; null: train a BPE on the corpus
    engine: str = "auto"  # tokenizers, tiktoken, gigatoken (checked); auto: tiktoken for Llama 3's, else tokenizers
    bos: bool = True  # begin each document with BOS, where the tokenizer has one
    eos: bool = True  # end each document with EOS, where the tokenizer has one
    chat_template: str | None = None  # Jinja file; null: the tokenizer's own
    vocab_size: int = 4096  # of the BPE that is trained
    retrieval_tokens: int = 0  # tokens of synthetic retrieval documents to add for each sequence length
    heldout_documents: int = 0  # long documents kept out of training, for evaluation
    heldout_length: int = 8192  # tokens that such a document has at least


@dataclass
class PrepareConfig:
    """``python data_prep/prepare.py``."""

    output: str = MISSING  # directory for tokenizer, documents and one packed store per sequence length
    sequence_lengths: list[int] = MISSING  # tokens
    seed: int = 0
    shard_mb: float = 64.0  # raw megabytes that a process tokenizes at a time; changes the bytes of large stores
    workers: int | None = None  # processes; null: one for each core, or none but this one for a small corpus
    stage: str = "all"  # all, or one for an array of jobs: plan, tokenize, pack, finish
    shard: int = 0  # stage=tokenize or pack: which share of the work
    n_shards: int = 1  # stage=tokenize or pack: of how many
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class ConvertConfig:
    """``python data_prep/convert_mds.py``."""

    output: str = MISSING  # directory
    format: str = "packed"  # of the output: packed (from MDS directories) or mds (from a packed store)
    root: str = "."  # what the directories of `sources` are relative to
    sources: dict[str, str] = field(default_factory=dict)  # domain -> MDS directory
    sequence_length: int = 65536  # tokens; shorter samples are padded, longer ones an error
    tokenizer: str | None = None  # that the tokens are of: directory or hub id
    store: str | None = None  # packed store, for format=mds
    verify: bool = True  # compare the digests in index.json
    workers: int | None = None  # processes; null: one for each core
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class InspectStoreConfig:
    """``python data_prep/inspect_store.py``."""

    store: str = MISSING  # directory of a packed store
    domain: str | None = None  # whose sequence is decoded; null: the first
    sequence: int = 0  # which one
    verify: bool = False  # hash every file again
    paths: PathsConfig = field(default_factory=PathsConfig)


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
class ExportConfig:
    """``python scripts/export.py``."""

    checkpoint: str = MISSING  # training checkpoint, or run directory for its newest
    output: str | None = None  # null: <run directory>/export
    dtype: str | None = None  # of the weights; null: the dtype that was trained in
    verify: bool = True
    overwrite: bool = False  # replace an earlier export
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class CompareConfig:
    """``python scripts/compare.py``."""

    runs: list[str] = MISSING  # run directories, each with its evaluation beside it
    baseline: str | None = None  # run that differences are taken to; null: the first
    output: str = MISSING  # report.html
    title: str = "ropewalk report"
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class ModelPath:
    """A model that is read as it is; ``model=X`` on the command line is ``model.path=X``."""

    path: str = MISSING


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
    results: list[str] = field(default_factory=list)  # run directories, for the clip figure's response
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


SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "prepare": PrepareConfig,
    "convert_mds": ConvertConfig,
    "inspect_store": InspectStoreConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "compare": CompareConfig,
    "advise": AdviseConfig,
    "inspect": InspectConfig,
    "figures": FiguresConfig,
    "geometry": GeometryConfig,
    "validate": ValidateConfig,
}


STORE_MEND = "make one with data_prep/prepare.py and name it with data=packed data.store=DIR data.sequence_length=N"
POSITIVE = (
    "max_steps",
    "global_batch_size",
    "micro_batch_size",
    "learning_rate",
    "gradient_clipping",
    "loss_chunk_size",
    "log_every",
    "peak_flops",
    "checkpoint_every",
    "keep_last",
    "keep_every",
    "stop_after",
)


def validate_train(config: TrainConfig, world_size: int) -> None:
    """Check everything about a training run that can be known before a model is built.

    Raises:
        ValueError: naming the value, the rule and the mend.
    """
    trainer, data = config.trainer, config.data
    for name in POSITIVE:
        value = getattr(trainer, name)
        if value is not None and value <= 0:
            raise ValueError(f"trainer.{name}={value} must be positive")
    for name in ("warmup_ratio", "min_lr_ratio", "adam_beta1", "adam_beta2"):
        if not 0 <= getattr(trainer, name) <= 1:
            raise ValueError(f"trainer.{name}={getattr(trainer, name)} is a share; set it between 0 and 1")
    one_of("trainer.device", trainer.device, ("cuda", "cpu"))
    one_of("trainer.dtype", trainer.dtype, ("bfloat16", "float32"))
    if trainer.device == "cuda" and trainer.dtype == "float32":
        raise ValueError(
            "trainer.dtype=float32 with trainer.device=cuda: the variable-length attention kernels take bf16 only; set "
            "trainer.dtype=bfloat16 (master weights and gradients are fp32 all the same)"
        )
    if trainer.stop_before is not None and instant(trainer.stop_before) <= time.time():
        raise ValueError(
            f"trainer.stop_before={trainer.stop_before} has passed already, so nothing would train; set a later one"
        )
    one_of("tracker.name", config.tracker.name, ("wandb", "trackio", "none"))
    one_of("deepspeed.stage", config.deepspeed.stage, (1, 2, 3))
    _validate_shares(config, world_size)
    if config.model.path is None and "model_type" not in config.model.architecture:
        raise ValueError(
            "model.path is null and model.architecture has no model_type; name a checkpoint (model.path=DIR_OR_HUB_ID) "
            f"or an architecture to build from scratch (one of {', '.join(SUPPORTED_MODEL_TYPES)})"
        )
    if trainer.keep_every is not None and trainer.keep_last is None:
        raise ValueError(
            f"trainer.keep_every={trainer.keep_every} without trainer.keep_last: nothing is deleted then; set "
            "trainer.keep_last=2 (the newest so many are kept as well), or leave both out"
        )
    _validate_guards(config.guards)
    _validate_chain(config)
    _validate_stores(data)


def _validate_stores(data: DataConfig) -> None:
    for name, where in {"data.store": data.store, **{f"data.stores.{k}": v for k, v in data.stores.items()}}.items():
        if not is_remote(where):
            existing_directory(name, where, STORE_MEND)
        elif data.cache_dir is None:
            raise ValueError(
                f"{name}={where} is a URL and data.cache_dir is null; set data.cache_dir=DIR, on local disk"
            )
    if "" in data.stores or any("/" in name for name in data.stores):
        raise ValueError(f"data.stores has the names {list(data.stores)}; give each one that is not empty and has no /")
    if data.cache_gib <= 0:
        raise ValueError(f"data.cache_gib={data.cache_gib} must be positive; it has to hold the largest token file")


def is_remote(where: str) -> bool:
    """Whether a store's place is a URL."""
    return "://" in where


def _validate_guards(guards: GuardConfig) -> None:
    one_of("guards.spike_action", guards.spike_action, ("skip", "stop"))
    if guards.max_refused < 1:
        raise ValueError(f"guards.max_refused={guards.max_refused} must be positive; 1 stops at the first refused step")
    if guards.spike_window is not None and guards.spike_window < 8:
        raise ValueError(
            f"guards.spike_window={guards.spike_window}: a median and a deviation of so few losses mean little; set 8 "
            "or more, or null"
        )
    if guards.stuck_multiple <= 1 or guards.stuck_seconds <= 0:
        raise ValueError(
            f"guards.stuck_multiple={guards.stuck_multiple} must exceed 1 and guards.stuck_seconds="
            f"{guards.stuck_seconds} must be positive; 10 and 60 are calm"
        )
    if guards.spike_deviations <= 0:
        raise ValueError(f"guards.spike_deviations={guards.spike_deviations} must be positive; 6 is cautious")


def _validate_shares(config: TrainConfig, world_size: int) -> None:
    trainer, sequence = config.trainer, config.parallel.sequence
    if sequence < 1 or world_size % sequence:
        raise ValueError(
            f"parallel.sequence={sequence} must divide the world size {world_size}; change it or the number of ranks"
        )
    row = trainer.micro_batch_size * config.data.sequence_length
    if row % sequence:
        raise ValueError(
            f"trainer.micro_batch_size x data.sequence_length = {row} tokens do not divide over parallel.sequence="
            f"{sequence} ranks; choose a value that divides them"
        )
    per_step = trainer.micro_batch_size * (world_size // sequence)
    if trainer.global_batch_size % per_step:
        near = max(1, round(trainer.global_batch_size / per_step)) * per_step
        over = f"world size {world_size}" + (f" / parallel.sequence={sequence}" if sequence > 1 else "")
        raise ValueError(
            f"trainer.global_batch_size={trainer.global_batch_size} is not a multiple of trainer.micro_batch_size="
            f"{trainer.micro_batch_size} x {over} = {per_step}; set it to {near}"
        )


def _validate_chain(config: TrainConfig) -> None:
    from ropewalk.rope import RopeChain

    chain = RopeChain(config.rope.chain)
    if config.model.path is not None and not chain.rebuilds:
        return  # it follows the checkpoint's own chain: both are run when that one's config is read
    chain.spectrum(
        head_dim=config.model.head_dim,
        theta=config.model.theta,
        pretrained_length=config.model.pretrained_length,
        trained_length=config.data.sequence_length,
    )


def instant(value: str) -> float:
    """``trainer.stop_before`` in seconds since 1970; a time without a zone is local.

    Raises:
        ValueError: for what is neither a number of seconds nor ISO 8601.
    """
    try:
        return float(value) if value.replace(".", "", 1).isdigit() else datetime.fromisoformat(value).timestamp()
    except ValueError as error:
        raise ValueError(
            f"trainer.stop_before={value} is no instant; give seconds since 1970 (on SLURM: $SLURM_JOB_END_TIME) or "
            "ISO 8601 (2026-11-24T18:00:00)"
        ) from error


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value} is not known; use one of: {', '.join(map(str, allowed))}")


def existing_directory(name: str, path: str, mend: str) -> Path:
    """The directory at ``path``, or ValueError with the mend."""
    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(f"{name}={path} is not a directory; {mend}")
    return directory


def require_device(name: str, device: str) -> None:
    """Raise ValueError where CUDA is asked for and there is none. Imports torch."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{name}=cuda, but torch {torch.__version__} sees no CUDA device; set {name}=cpu or run on a GPU node"
        )
