"""Rules that no type can state: ranges of numbers, those of a training run, and checks that several commands share."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ropewalk.config.analysis import AdviseConfig, FiguresConfig, GeometryConfig, InspectConfig
from ropewalk.config.data import (
    ConvertConfig,
    CorpusConfig,
    ExecutorConfig,
    FrameConfig,
    GatherConfig,
    InspectStoreConfig,
    PrepareVideoConfig,
    PrepareVniahConfig,
    SceneConfig,
    TowerConfig,
)
from ropewalk.config.evaluation import CompareConfig, EvaluateConfig, SuiteConfig, ValidateConfig, VniahConfig
from ropewalk.config.export import AverageConfig, ExportConfig, RepairConfig
from ropewalk.config.groups import AnswersConfig, ClusterConfig, NeedleConfig, SlurmConfig
from ropewalk.config.schedule import DECAYS
from ropewalk.config.train import (
    ATTENTION_CHOICES,
    DROPPED_FIELDS,
    SUPPORTED_MODEL_TYPES,
    AssumptionConfig,
    DataConfig,
    DeepSpeedConfig,
    GuardConfig,
    InTrainingConfig,
    ModelConfig,
    NoiseConfig,
    PlanConfig,
    PrimaryConfig,
    TrackerConfig,
    TrainConfig,
    TrainerConfig,
)
from ropewalk.errors import UserError

STORE_FIX = "make one with data_prep/prepare.py and name it with data=packed data.store=DIR data.sequence_length=N"


class Range(NamedTuple):
    """Numbers that a key may have; nan is never among them."""

    lowest: float
    highest: float
    words: str
    is_open: bool = False  # without ``lowest`` itself

    def holds(self, value: float) -> bool:
        """True if the value is in the range."""
        return (self.lowest < value if self.is_open else self.lowest <= value) and value <= self.highest


MOST = sys.float_info.max  # finite
POSITIVE = Range(0, MOST, "must be positive and finite", is_open=True)
NOT_NEGATIVE = Range(0, MOST, "must be 0 or more, and finite")
SHARE = Range(0, 1, "is a share; set it between 0 and 1")
BELOW_ONE = Range(0, math.nextafter(1, 0), "must be 0 or more, and less than 1")
SEED = Range(0, 2**63 - 1, "must be 0 or more, and below 2^63")
SEED_OF_HARNESSES = Range(0, 2**32 - 1, "must be 0 or more, and below 2^32")  # numpy's, which lm-eval sets
FINITE = Range(-MOST, MOST, "must be a finite number")
# Every number of a configuration is finite; those named here, by dataclass, are in these ranges as well.
RANGES: dict[type, dict[Range, str]] = {
    ModelConfig: {POSITIVE: "theta head_dim pretrained_length"},
    DataConfig: {POSITIVE: "sequence_length cache_gib"},
    TrainerConfig: {
        NOT_NEGATIVE: "adam_eps weight_decay z_loss profile_steps",
        POSITIVE: "max_steps global_batch_size micro_batch_size learning_rate loss_chunk_size mlp_chunk_size log_every "
        "peak_flops checkpoint_every keep_last keep_every stop_after",
        POSITIVE._replace(highest=math.inf, words="must be positive; inf clips nothing"): "gradient_clipping",
        SHARE: "warmup_ratio min_lr_ratio decay_ratio",
        BELOW_ONE: "adam_beta1 adam_beta2",
    },
    DeepSpeedConfig: {NOT_NEGATIVE: "param_persistence_threshold"},
    GuardConfig: {
        POSITIVE: "max_refused spike_deviations stuck_seconds stuck_batch_seconds",
        Range(8, MOST, "is too few losses for a median and a deviation; set 8 or more, or null"): "spike_window",
        Range(1, MOST, "must exceed 1; the default is 10", is_open=True): "stuck_multiple",
    },
    InTrainingConfig: {POSITIVE: "every lengths max_documents"},
    NeedleConfig: {SHARE: "depths", POSITIVE: "digits", NOT_NEGATIVE: "samples distractors"},
    PrimaryConfig: {POSITIVE: "length difference"},
    AnswersConfig: {
        NOT_NEGATIVE: "count",
        POSITIVE: "per_sequence",
        Range(2, 9, "must be 2 to 9: values of a marker differ in their first digit"): "values",
    },
    SlurmConfig: {POSITIVE: "nodes cpus_per_gpu"},
    ClusterConfig: {
        POSITIVE: "gpus_per_node gpu_memory_gib peak_tflops memory_tb_s nvlink_gb_s network_gb_s host_memory_gib "
        "disk_write_gb_s",
        NOT_NEGATIVE: "price_per_gpu_hour",
    },
    AssumptionConfig: {
        POSITIVE: "hash_gb_s",
        NOT_NEGATIVE: "step_overhead context_gib nccl_gib fragmentation",
        Range(0, 1, "is a share of the peak; null goes by the speeds of the kernels", is_open=True): "utilisation",
    },
    PlanConfig: {POSITIVE: "nodes kv_lengths"},
    NoiseConfig: {
        POSITIVE: "nodes kv_lengths horizons pairs difference",
        NOT_NEGATIVE: "spread",
        Range(2, MOST, "is too few for a spread; set 2 or more"): "seeds branches",
    },
}

PERCENT = Range(0, 100, "is a percentage; set it between 0 and 100")
RANGES |= {  # of the commands that train nothing; what each of them checks in words of its own is not here
    CorpusConfig: {POSITIVE: "vocab_size heldout_length"},
    ExecutorConfig: {POSITIVE: "tasks workers mem_per_cpu_gb"},
    GatherConfig: {POSITIVE: "extract_seconds"},
    TowerConfig: {POSITIVE: "patch_size merge_size temporal_patch_size"},
    FrameConfig: {POSITIVE: "fps max_frames max_pixels"},
    PrepareVniahConfig: {POSITIVE: "frames fps height width"},
    VniahConfig: {
        SHARE: "depths",
        POSITIVE: "samples factors",
        Range(2, MOST, "must be 2 or more: one frame is an image"): "frames",
        NOT_NEGATIVE: "distractors",
    },
    SceneConfig: {POSITIVE: "frames height width", NOT_NEGATIVE: "count"},
    PrepareVideoConfig: {POSITIVE: "sequence_length shard_sequences"},
    ConvertConfig: {POSITIVE: "sequence_length workers"},
    InspectStoreConfig: {NOT_NEGATIVE: "sequence"},
    SuiteConfig: {POSITIVE: "samples"},
    EvaluateConfig: {POSITIVE: "max_documents prefill_chunk", SEED_OF_HARNESSES: "seed"},
    ValidateConfig: {POSITIVE: "max_documents", NOT_NEGATIVE: "sweep_samples", SEED_OF_HARNESSES: "seed"},
    CompareConfig: {PERCENT: "effective_needle effective_ruler"},
    ExportConfig: {POSITIVE: "verify_tokens"},
    AverageConfig: {Range(2, MOST, "is no average; set 2 or more, or null"): "last", NOT_NEGATIVE: "steps"},
    RepairConfig: {POSITIVE: "pretrained_length"},
    AdviseConfig: {POSITIVE: "theta train_length target_length"},
    InspectConfig: {POSITIVE: "length"},
    FiguresConfig: {POSITIVE: "train_length target_length"},
    GeometryConfig: {POSITIVE: "lengths max_documents cluster_samples", NOT_NEGATIVE: "layers pca_heads"},
}


def validate_numbers(config: Any, prefix: str = "") -> None:
    """Check that every number of a configuration is finite and in its range, those in its groups and lists included.

    Raises:
        UserError: naming the first that is not.
    """
    ranges = {"seed": SEED, "order_seed": SEED}
    ranges |= {name: range_ for range_, names in RANGES.get(type(config), {}).items() for name in names.split()}
    for field in fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if is_dataclass(value):
            validate_numbers(value, f"{name}.")
        for number in value if isinstance(value, list) else [value]:
            allowed = ranges.get(field.name, FINITE)
            if isinstance(number, (int, float)) and not isinstance(number, bool) and not allowed.holds(number):
                raise UserError(f"{name}={number} {allowed.words}")


def validate_train(config: TrainConfig, world_size: int) -> None:
    """Check everything about a training run that can be known from its configuration alone.

    Args:
        config: of the run.
        world_size: ranks.

    Raises:
        UserError: naming the value, the rule and the fix.
    """
    validate_numbers(config)
    trainer = config.trainer
    one_of("trainer.device", trainer.device, ("cuda", "cpu"))
    one_of("trainer.dtype", trainer.dtype, ("bfloat16", "float32"))
    one_of("trainer.schedule", trainer.schedule, tuple(DECAYS))
    if trainer.device == "cuda" and trainer.dtype == "float32":
        raise UserError(
            "trainer.dtype=float32 with trainer.device=cuda: the variable-length attention kernels take bf16 only; set "
            "trainer.dtype=bfloat16 (master weights and gradients are fp32 all the same)"
        )
    one_of("trainer.attention", trainer.attention, ATTENTION_CHOICES)
    if trainer.device == "cpu" and trainer.attention != "auto":
        raise UserError(
            f"trainer.attention={trainer.attention} with trainer.device=cpu: it is a kernel for GPUs; set "
            "trainer.attention=auto"
        )
    for name in ("offload_activations", "keep_attention"):
        if getattr(trainer, name) and not trainer.activation_checkpointing:
            raise UserError(
                f"trainer.{name}=true changes activation checkpointing, and trainer.activation_checkpointing=false; "
                "set both, or neither"
            )
    if trainer.stop_before is not None and instant(trainer.stop_before) <= time.time():
        raise UserError(
            f"trainer.stop_before={trainer.stop_before} has passed already, so nothing would train; set a later one"
        )
    if not config.run_name.strip(" ./") or ".." in config.run_name.split("/"):
        raise UserError(f"run_name={config.run_name!r} names no directory below {config.paths.output_dir}; give a name")
    _validate_tracker(config.tracker)
    one_of("deepspeed.stage", config.deepspeed.stage, (1, 2, 3))
    batching(config, world_size)
    one_of("guards.spike_action", config.guards.spike_action, ("skip", "stop"))
    one_of("start_from.optimizer", config.start_from.optimizer, ("keep", "drop"))
    one_of("start_from.order", config.start_from.order, ("restart", "continue"))
    for name in config.model.drop:
        one_of("model.drop", name, DROPPED_FIELDS)
    if not _has_weights(config) and "model_type" not in config.model.architecture:
        raise UserError(
            "model.path is null and model.architecture has no model_type; name a checkpoint (model.path=DIR_OR_HUB_ID) "
            f"or an architecture to build from scratch (one of {', '.join(SUPPORTED_MODEL_TYPES)})"
        )
    if trainer.keep_every is not None and trainer.keep_last is None:
        raise UserError(
            f"trainer.keep_every={trainer.keep_every} without trainer.keep_last: nothing is deleted then; set "
            "trainer.keep_last=2 (the newest so many are kept as well), or leave both out"
        )
    _validate_primary(config.primary)
    _validate_evaluation(config)
    _validate_chain(config)
    _validate_stores(config.data)


def _validate_primary(primary: PrimaryConfig) -> None:
    for pair in primary.pairs:
        if len(pair) != 2 or pair[0] == pair[1]:
            raise UserError(f"primary.pairs has {pair}; each names two arms by their rope.name: [cope20, rope]")
    if len({frozenset(pair) for pair in primary.pairs}) < len(primary.pairs):
        raise UserError(f"primary.pairs={primary.pairs} names a pair twice; name each once")
    lengths = primary.length if isinstance(primary.length, list) else [primary.length]
    if primary.length is not None and not (lengths and all(type(length) is int for length in lengths)):
        raise UserError(
            f"primary.length={primary.length} is neither tokens nor a list of them: 65536 or [131072,262144]"
        )
    if primary.pairs and (primary.length is None or primary.difference is None):
        raise UserError(
            f"primary.length={primary.length} and primary.difference={primary.difference}: a declared family needs the "
            "context length of its number and the smallest difference of interest; set both"
        )


def _validate_stores(data: DataConfig) -> None:
    for name, where in {"data.store": data.store, **{f"data.stores.{k}": v for k, v in data.stores.items()}}.items():
        if is_remote(where) and data.cache_dir is None:
            raise UserError(
                f"{name}={where} is a URL and data.cache_dir is null; set data.cache_dir=DIR, on local disk"
            )
    if "" in data.stores or any("/" in name for name in data.stores):
        raise UserError(f"data.stores has the names {list(data.stores)}; give each one that is not empty and has no /")


def _validate_tracker(tracker: TrackerConfig) -> None:
    one_of("tracker.name", tracker.name, ("wandb", "trackio", "none"))
    if tracker.name != "wandb":
        return
    for tag in tracker.tags:
        if not 1 <= len(tag) <= 64:
            raise UserError(f"tracker.tags has {tag!r} of {len(tag)} letters; W&B takes 1 to 64")
    bad = sorted(set(tracker.project) & set("/\\#?%:"))
    if bad or not 1 <= len(tracker.project) <= 128:
        raise UserError(
            f"tracker.project={tracker.project!r} is not a name that W&B takes: 1 to 128 letters, none of / \\ # ? % :"
        )


def is_remote(where: str) -> bool:
    """True if a store lies behind a URL."""
    return "://" in where


def _validate_evaluation(config: TrainConfig) -> None:
    evaluation, longest, sequence = config.evaluation, config.data.sequence_length, config.parallel.sequence
    if evaluation.every is None:
        return
    if evaluation.documents is None:
        raise UserError(
            "evaluation.documents=null is not a directory; write held-out documents with data_prep/prepare.py, or "
            "leave evaluation.every=null"
        )
    for length in evaluation.lengths:
        if length > longest:
            raise UserError(
                f"evaluation.lengths has {length}, past data.sequence_length={longest}; beyond it a method may need "
                "test-time scaling, which scripts/evaluate.py gives"
            )
        if length % sequence:
            raise UserError(f"evaluation.lengths has {length}, which parallel.sequence={sequence} does not divide")


class Batching(NamedTuple):
    """The division of a global batch among ranks and micro batches."""

    accumulation_steps: int  # micro batches that each rank adds up for one step
    tokens_per_step: int  # of the global batch


def batching(config: TrainConfig, world_size: int) -> Batching:
    """The division of a step's global batch over ``world_size`` ranks.

    Raises:
        UserError: it does not divide.
    """
    trainer, sequence = config.trainer, config.parallel.sequence
    if sequence < 1 or world_size % sequence:
        raise UserError(
            f"parallel.sequence={sequence} must divide the world size {world_size}; change it or the number of ranks"
        )
    row = trainer.micro_batch_size * config.data.sequence_length
    if row % sequence:
        raise UserError(
            f"trainer.micro_batch_size x data.sequence_length = {row} tokens do not divide over parallel.sequence="
            f"{sequence} ranks; choose a value that divides them"
        )
    per_step = trainer.micro_batch_size * (world_size // sequence)
    if trainer.global_batch_size % per_step:
        near = max(1, round(trainer.global_batch_size / per_step)) * per_step
        over = f"world size {world_size}" + (f" / parallel.sequence={sequence}" if sequence > 1 else "")
        raise UserError(
            f"trainer.global_batch_size={trainer.global_batch_size} is not a multiple of trainer.micro_batch_size="
            f"{trainer.micro_batch_size} x {over} = {per_step}; set it to {near}"
        )
    tokens = trainer.global_batch_size * config.data.sequence_length
    return Batching(trainer.global_batch_size // per_step, tokens)


def sharing_degrees(heads: int, kv_heads: int) -> list[int]:
    """Numbers of ranks that can share a row of tokens, and so the heads; ascending.

    Each rank gets as many query heads, and the key/value heads of its own: several, or one that others have too.

    Args:
        heads: query heads.
        kv_heads: key/value heads, which divide them.
    """
    return [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]


def validate_sharing(sequence: int, heads: int, kv_heads: int) -> None:
    """Check ``parallel.sequence`` against a model's heads; see :func:`sharing_degrees`.

    Raises:
        UserError: its ranks would not get equal shares.
    """
    if sequence not in (degrees := sharing_degrees(heads, kv_heads)):
        raise UserError(
            f"parallel.sequence={sequence} cannot share the model's {heads} query and {kv_heads} key/value heads: it "
            "must divide the query heads, and divide or be a multiple of the key/value heads; set it to one of "
            f"{', '.join(map(str, degrees))}"
        )


def _has_weights(config: TrainConfig) -> bool:
    """True if training begins with a checkpoint's weights, and so with its chain."""
    return config.model.path is not None or config.start_from.run is not None


def _validate_chain(config: TrainConfig) -> None:
    from ropewalk.rope import RopeChain  # late: composing a configuration loads no numpy

    chain = RopeChain.of(config.rope)
    if _has_weights(config) and not chain.rebuilds:
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
        UserError: for what is neither a number of seconds nor ISO 8601.
    """
    try:
        return float(value) if value.replace(".", "", 1).isdigit() else datetime.fromisoformat(value).timestamp()
    except ValueError as error:
        raise UserError(
            f"trainer.stop_before={value} is not a time; give seconds since 1970 (on SLURM: $SLURM_JOB_END_TIME) or "
            "ISO 8601 (2026-11-24T18:00:00)"
        ) from error


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise UserError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise UserError(f"{name}={value} is not known; use one of: {', '.join(map(str, allowed))}")


def existing_directory(name: str, path: str, fix: str) -> Path:
    """The directory at ``path``, or UserError with the fix."""
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{name}={path} is not a directory; {fix}")
    return directory


def validate_device(name: str, device: str) -> None:
    """Raise UserError where CUDA is asked for and there is none. Imports torch."""
    import torch

    if device in ("cuda", "auto") and not torch.cuda.is_available():
        raise UserError(
            f"{name}={device}, but torch {torch.__version__} sees no CUDA device ({cuda_problem()}); set {name}=cpu, "
            "run on a GPU node, or install the torch that fits its driver (docs/quickstart.md)"
        )


def cuda_problem() -> str:
    """Why torch has no CUDA device, in CUDA's own words. Imports torch."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()).rstrip(".")
    return "no GPU is visible"
