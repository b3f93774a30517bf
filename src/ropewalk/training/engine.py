"""The DeepSpeed engine: ZeRO configuration, optimizer, spectrum, and the optimizer of one that is learned."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ropewalk.config.rules import batching
from ropewalk.config.train import DeepSpeedConfig, TrainConfig, TrainerConfig
from ropewalk.model.activations import place_activations
from ropewalk.model.learned_rotary import learn_frequencies, learned_alpha
from ropewalk.model.load import build_for_training
from ropewalk.model.loss import LossModel
from ropewalk.model.rotary import assert_spectrum, install_spectrum
from ropewalk.model.vision import has_vision, tower_of
from ropewalk.rope.chain import learned_step
from ropewalk.rope.position import position_of
from ropewalk.training.checkpoint.restore import MOMENTS
from ropewalk.training.distributed import Ranks, import_deepspeed, log_once, sequence_groups
from ropewalk.training.hooks import Hook, Step


def zero_config(
    trainer: TrainerConfig, zero: DeepSpeedConfig, accumulation_steps: int, sequence: int = 1
) -> dict[str, Any]:
    """DeepSpeed's own configuration. Gradients add up and travel in fp32, whatever the model's dtype."""
    zero_optimization: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": zero.overlap_comm,
        "contiguous_gradients": True,
        "stage3_param_persistence_threshold": zero.param_persistence_threshold,
    }
    if zero.offload_optimizer:
        zero_optimization["offload_optimizer"] = {"device": "cpu", "pin_memory": trainer.device == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": trainer.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": trainer.gradient_clipping,
        # ZeRO-1 in bf16 keeps a second gradient of every parameter unless each is added up at once
        "bf16": {"enabled": trainer.dtype == "bfloat16", "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "seq_parallel_communication_data_type": "fp32",
        "sequence_parallel_size": sequence,
        "zero_optimization": zero_optimization,
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Decay for matrices, none for norms and biases; what is frozen is left out.

    A partitioned parameter reports one dimension whatever it is, so the whole shape decides.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if len(shape) >= 2 else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


@contextmanager
def partitioned_init(settings: dict[str, Any]) -> Iterator[None]:
    """Models that transformers builds inside come out partitioned, at stage 3.

    transformers finds the settings as long as their object lives, which a traceback could keep: they are taken away.
    """
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    found = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del found


def start_engine(config: TrainConfig, model_config: PreTrainedConfig, ranks: Ranks) -> Any:
    """Build the model partitioned from the start, wrap it in the engine, and put its spectrum in place."""
    deepspeed = import_deepspeed(config.trainer.device)
    trainer = config.trainer
    steps = batching(config, ranks.world_size).accumulation_steps
    settings = zero_config(trainer, config.deepspeed, steps, ranks.sequence)
    torch.manual_seed(trainer.seed)
    dtype, revision = getattr(torch, trainer.dtype), config.model.revision
    # Random weights are drawn where ZeRO-3 draws them.
    is_drawn_whole = config.model.path is None and config.deepspeed.stage < 3
    with partitioned_init(settings), torch.device(ranks.device) if is_drawn_whole else nullcontext():
        lm = build_for_training(model_config, config.model.path, dtype, revision, trainer.attention)
    if has_vision(model_config) and not config.model.train_tower:
        tower_of(lm).requires_grad_(False)
    place_activations(lm, trainer)
    lm.train()
    loss_model = LossModel(lm, trainer.loss_chunk_size, trainer.z_loss)
    optimizer = torch.optim.AdamW(
        parameter_groups(loss_model.parameters(), trainer.weight_decay),
        lr=trainer.learning_rate,
        betas=(trainer.adam_beta1, trainer.adam_beta2),
        eps=trainer.adam_eps,
        fused=is_fused(config),
    )
    mpu, _ = sequence_groups(ranks.sequence)
    with redirect_stdout(io.StringIO()):  # ZeRO-1 in bf16 prints its memory, line by line
        engine, *_ = deepspeed.initialize(model=loss_model, optimizer=optimizer, config=settings, mpu=mpu)
    if hasattr(engine.optimizer, "bf16_groups"):
        engine.optimizer.mpu = (
            None  # ZeRO-1 in bf16 asks it for tensor parallelism, which sequence groups know nothing of
        )
    if learned_step(position_of(lm.config).chain) is not None:
        learn_frequencies(lm, ranks.device)
    place_spectrum(engine)
    return engine


def is_fused(config: TrainConfig) -> bool:
    """True if AdamW runs as one kernel: on a GPU, and on the CPU where the states are offloaded to it.

    On a CPU that computes everything it stays the sequence of operations that its tests compare with.
    """
    return config.trainer.device == "cuda" or config.deepspeed.offload_optimizer


def averaging_ranks(engine: Any, ranks: Ranks) -> int:
    """The number that ZeRO divides the gradients' sum over all ranks by.

    Of ranks that share a sequence, DeepSpeed 0.19.8 averages at stage 3 and adds up at stages 1 and 2.
    """
    return ranks.world_size if engine.zero_optimization_stage() == 3 else ranks.data_size


def place_spectrum(engine: Any) -> None:
    """Install the float32 spectrum and assert it; after the engine is built and after every load."""
    lm = engine.module.lm
    install_spectrum(lm)
    position = position_of(lm.config)
    assert_spectrum(lm, position.spectrum(), position.other_layers)


class LearnedSpectrum(Hook):
    """Trains the frequencies of a chain that ends in ``learned``; does nothing under any other.

    They are d/2 numbers, so every rank holds all of them with their moments, whatever the stage of ZeRO: each adds up
    its gradient over micro batches in fp32, and the sum over ranks is the same on all.
    """

    def __init__(self, engine: Any, trainer: TrainerConfig, ranks: Ranks, state: Mapping[str, Any] | None) -> None:
        """Begin at zero, or go on from the ``state`` of a checkpoint."""
        self.engine, self.trainer, self.ranks = engine, trainer, ranks
        self.alpha = learned_alpha(engine.module.lm)
        step = learned_step(position_of(engine.module.lm.config).chain)
        if self.alpha is None or step is None:
            return
        self.peak: float = step.arguments["learning_rate"]
        betas = (trainer.adam_beta1, trainer.adam_beta2)
        self.optimizer = torch.optim.AdamW([self.alpha], betas=betas, eps=trainer.adam_eps, weight_decay=0.0)
        if state is not None:
            self.alpha.data.copy_(torch.tensor(state["alpha"]))
            if state["steps"]:
                moments = {name: self.alpha.new_tensor(state[name]) for name in MOMENTS}
                self.optimizer.state[self.alpha] = {"step": torch.tensor(float(state["steps"])), **moments}

    def gradient(self) -> Tensor:
        """The global batch's gradient, float32 (d/2,), nats per trained token and unit of alpha. Collective."""
        assert self.alpha is not None
        own = torch.zeros_like(self.alpha) if self.alpha.grad is None else self.alpha.grad.clone()
        dist.all_reduce(own)
        return own / averaging_ranks(self.engine, self.ranks)

    def after_step(self, step: Step) -> None:
        """Move the frequencies, unless the weights' step was refused. Collective."""
        if self.alpha is None:
            return
        gradient = self.gradient()
        self.alpha.grad = None
        if step.refused is not None:
            return
        if not gradient.isfinite().all():
            log_once(
                f"warning: step {step.number}: the gradient of the learned spectrum is not finite; it stays as it was"
            )
            return
        self.alpha.grad = gradient
        if self.trainer.gradient_clipping:
            torch.nn.utils.clip_grad_norm_([self.alpha], self.trainer.gradient_clipping)
        self.optimizer.param_groups[0]["lr"] = self.peak * step.learning_rate / self.trainer.learning_rate
        self.optimizer.step()
        self.alpha.grad = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.alpha is not None:
            factors = self.alpha.detach().exp()
            log_once(f"learned spectrum: frequencies times {factors.min():.4g} to {factors.max():.4g}")

    def state(self) -> dict[str, Any]:
        """For the checkpoint: alpha and its moments, every digit; empty where nothing is learned."""
        if self.alpha is None:
            return {}
        held = self.optimizer.state.get(self.alpha, {})
        moments = {name: held[name].tolist() for name in MOMENTS if held}
        return {"learned": {"alpha": self.alpha.tolist(), "steps": int(held.get("step", 0)), **moments}}
