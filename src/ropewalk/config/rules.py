"""Rules of a training run that no type can state, and checks that several commands share."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from ropewalk.config.train import SUPPORTED_MODEL_TYPES, DataConfig, GuardConfig, InTrainingConfig, TrainConfig
from ropewalk.errors import UserError
from ropewalk.rope import RopeChain

STORE_FIX = "make one with data_prep/prepare.py and name it with data=packed data.store=DIR data.sequence_length=N"
POSITIVE = (
    "max_steps",
    "global_batch_size",
    "micro_batch_size",
    "learning_rate",
    "gradient_clipping",
    "loss_chunk_size",
    "mlp_chunk_size",
    "log_every",
    "peak_flops",
    "checkpoint_every",
    "keep_last",
    "keep_every",
    "stop_after",
)


def validate_train(config: TrainConfig, world_size: int, *, stores: bool = True) -> None:
    """Check everything about a training run that can be known before a model is built.

    Args:
        config: of the run.
        world_size: ranks.
        stores: whether the data must be there already.

    Raises:
        UserError: naming the value, the rule and the fix.
    """
    trainer, data = config.trainer, config.data
    for name in POSITIVE:
        value = getattr(trainer, name)
        if value is not None and value <= 0:
            raise UserError(f"trainer.{name}={value} must be positive")
    for name in ("warmup_ratio", "min_lr_ratio", "adam_beta1", "adam_beta2"):
        if not 0 <= getattr(trainer, name) <= 1:
            raise UserError(f"trainer.{name}={getattr(trainer, name)} is a share; set it between 0 and 1")
    one_of("trainer.device", trainer.device, ("cuda", "cpu"))
    one_of("trainer.dtype", trainer.dtype, ("bfloat16", "float32"))
    if trainer.device == "cuda" and trainer.dtype == "float32":
        raise UserError(
            "trainer.dtype=float32 with trainer.device=cuda: the variable-length attention kernels take bf16 only; set "
            "trainer.dtype=bfloat16 (master weights and gradients are fp32 all the same)"
        )
    if trainer.z_loss < 0:
        raise UserError(f"trainer.z_loss={trainer.z_loss} must not be negative; 0 leaves it out, 1e-4 is common")
    if trainer.offload_activations and not trainer.activation_checkpointing:
        raise UserError(
            "trainer.offload_activations=true moves what activation checkpointing keeps, and "
            "trainer.activation_checkpointing=false keeps nothing; set both, or neither"
        )
    if trainer.stop_before is not None and instant(trainer.stop_before) <= time.time():
        raise UserError(
            f"trainer.stop_before={trainer.stop_before} has passed already, so nothing would train; set a later one"
        )
    one_of("tracker.name", config.tracker.name, ("wandb", "trackio", "none"))
    one_of("deepspeed.stage", config.deepspeed.stage, (1, 2, 3))
    _validate_shares(config, world_size)
    one_of("start_from.optimizer", config.start_from.optimizer, ("keep", "drop"))
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
    _validate_guards(config.guards)
    _validate_evaluation(config)
    _validate_chain(config)
    if stores:
        _validate_stores(data)
        _validate_documents(config.evaluation)


def _validate_stores(data: DataConfig) -> None:
    for name, where in {"data.store": data.store, **{f"data.stores.{k}": v for k, v in data.stores.items()}}.items():
        if not is_remote(where):
            existing_directory(name, where, STORE_FIX)
        elif data.cache_dir is None:
            raise UserError(
                f"{name}={where} is a URL and data.cache_dir is null; set data.cache_dir=DIR, on local disk"
            )
    if "" in data.stores or any("/" in name for name in data.stores):
        raise UserError(f"data.stores has the names {list(data.stores)}; give each one that is not empty and has no /")
    if data.cache_gib <= 0:
        raise UserError(f"data.cache_gib={data.cache_gib} must be positive; it has to hold the largest token file")


def is_remote(where: str) -> bool:
    """True if a store lies behind a URL."""
    return "://" in where


def _validate_guards(guards: GuardConfig) -> None:
    one_of("guards.spike_action", guards.spike_action, ("skip", "stop"))
    if guards.max_refused < 1:
        raise UserError(f"guards.max_refused={guards.max_refused} must be positive; 1 stops at the first refused step")
    if guards.spike_window is not None and guards.spike_window < 8:
        raise UserError(
            f"guards.spike_window={guards.spike_window}: a median and a deviation of so few losses mean little; set 8 "
            "or more, or null"
        )
    if guards.stuck_multiple <= 1 or min(guards.stuck_seconds, guards.stuck_batch_seconds) <= 0:
        raise UserError(
            f"guards.stuck_multiple={guards.stuck_multiple} must exceed 1, guards.stuck_seconds={guards.stuck_seconds} "
            f"and guards.stuck_batch_seconds={guards.stuck_batch_seconds} must be positive; the defaults are 10, 60 "
            "and 480"
        )
    if guards.spike_deviations <= 0:
        raise UserError(f"guards.spike_deviations={guards.spike_deviations} must be positive; 6 is cautious")


def _validate_documents(evaluation: InTrainingConfig) -> None:
    if evaluation.every is not None:
        fix = "write held-out documents with data_prep/prepare.py, or leave evaluation.every=null"
        existing_directory("evaluation.documents", evaluation.documents or "null", fix)


def _validate_evaluation(config: TrainConfig) -> None:
    evaluation, longest, sequence = config.evaluation, config.data.sequence_length, config.parallel.sequence
    if evaluation.every is None:
        return
    if evaluation.every < 1:
        raise UserError(f"evaluation.every={evaluation.every} must be positive; null for no evaluation while training")
    for length in evaluation.lengths:
        if length > longest:
            raise UserError(
                f"evaluation.lengths has {length}, past data.sequence_length={longest}; beyond it a method may need "
                "test-time scaling, which scripts/evaluate.py gives"
            )
        if length % sequence:
            raise UserError(f"evaluation.lengths has {length}, which parallel.sequence={sequence} does not divide")


def _validate_shares(config: TrainConfig, world_size: int) -> None:
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


def _has_weights(config: TrainConfig) -> bool:
    """True if training begins with a checkpoint's weights, and so with its chain."""
    return config.model.path is not None or config.start_from.run is not None


def _validate_chain(config: TrainConfig) -> None:
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


def require_device(name: str, device: str) -> None:
    """Raise UserError where CUDA is asked for and there is none. Imports torch."""
    import torch

    if device in ("cuda", "auto") and not torch.cuda.is_available():
        raise UserError(
            f"{name}={device}, but torch {torch.__version__} sees no CUDA device; set {name}=cpu or run on a GPU node"
        )
