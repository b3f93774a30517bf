"""The DeepSpeed engine: ZeRO configuration, optimizer, and the model whose output is the loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ropewalk.config.rules import batching
from ropewalk.config.train import DeepSpeedConfig, TrainConfig, TrainerConfig
from ropewalk.data.order.batches import VisionInputs
from ropewalk.model.activations import place_activations
from ropewalk.model.attention import Documents
from ropewalk.model.load import build_for_training
from ropewalk.model.loss import tiled_linear_cross_entropy
from ropewalk.model.rotary import assert_spectrum, install_spectrum
from ropewalk.model.vision import embed, has_vision, tower_of
from ropewalk.rope.position import position_of
from ropewalk.training.distributed import Ranks, import_deepspeed, sequence_groups


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
        "bf16": {"enabled": trainer.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "seq_parallel_communication_data_type": "fp32",
        "sequence_parallel_size": sequence,
        "zero_optimization": zero_optimization,
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


class LossModel(nn.Module):
    """A causal language model whose forward is the summed loss, so that ZeRO-3 gathers the head inside it."""

    def __init__(self, lm: PreTrainedModel, chunk_size: int, z_loss: float = 0.0) -> None:
        super().__init__()
        self.lm = lm
        self.chunk_size, self.z_loss = chunk_size, z_loss

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        documents: Documents,
        token_losses: Tensor | None = None,
        logits_at: Tensor | None = None,
        vision: VisionInputs | None = None,
    ) -> Tensor:
        """Summed cross entropy of one packed row, and its z-loss if there is one; or some of its logits.

        Args:
            input_ids: int64 (1, tokens).
            position_ids: int64 (1, tokens), from 0 in each document.
            labels: int64 (1, tokens), already shifted; -100 is not trained on.
            documents: where each document begins and ends.
            token_losses: fp32 (tokens,), gets the loss of each trained token.
            logits_at: int64 (n,), positions in the row.
            vision: of a model of images and videos; its positions are rotated by in the place of ``position_ids``.

        Returns:
            fp32 scalar, nats; under ``logits_at`` fp32 (n, vocabulary) instead.
        """
        # use_cache=True would let packed documents see each other in stock attention.
        decoder = self.lm.get_decoder()
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        if vision is not None:
            inputs = {"inputs_embeds": embed(self.lm, input_ids, vision), "position_ids": vision.positions}
        output = decoder(**inputs, use_cache=False, documents=documents)
        hidden = output.last_hidden_state[0]
        head = self.lm.get_output_embeddings().weight
        if not torch.is_grad_enabled():
            head = head.detach()  # else the loss would form the head's gradient all the same
        if logits_at is not None:
            return (hidden[logits_at] @ head.T).float()
        return tiled_linear_cross_entropy(hidden, head, labels[0], self.chunk_size, token_losses, self.z_loss)


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


def start_engine(config: TrainConfig, model_config: PreTrainedConfig, ranks: Ranks) -> Any:
    """Build the model partitioned from the start, wrap it in the engine, and put its spectrum in place."""
    deepspeed = import_deepspeed(config.trainer.device)
    from transformers.integrations import HfDeepSpeedConfig

    trainer = config.trainer
    steps = batching(config, ranks.world_size).accumulation_steps
    settings = zero_config(trainer, config.deepspeed, steps, ranks.sequence)
    partitioned_init = HfDeepSpeedConfig(settings)  # transformers looks for it while it builds
    torch.manual_seed(trainer.seed)
    lm = build_for_training(model_config, config.model.path, getattr(torch, trainer.dtype), config.model.revision)
    del partitioned_init
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
    engine, *_ = deepspeed.initialize(model=loss_model, optimizer=optimizer, config=settings, mpu=mpu)
    place_spectrum(engine)
    return engine


def is_fused(config: TrainConfig) -> bool:
    """True if AdamW runs as one kernel: on a GPU that holds its states."""
    return config.trainer.device == "cuda" and not config.deepspeed.offload_optimizer


def averaging_ranks(engine: Any, ranks: Ranks) -> int:
    """The number that ZeRO divides the gradients' sum over all ranks by.

    Of ranks that share a sequence, DeepSpeed 0.19.8 averages at stage 3 and adds up at stages 1 and 2.
    """
    return ranks.world_size if engine.zero_optimization_stage() == 3 else ranks.data_size


def restore_settings(engine: Any, config: TrainConfig) -> None:
    """Put the run's own optimizer settings back, as loading a state brings the saved run's along.

    Each step count becomes a tensor of its own where AdamW looks for it: beside the parameter if it is fused, else on
    the CPU. DeepSpeed 0.19.8 loads a universal checkpoint with one for all on the CPU, which a fused AdamW refuses on a
    GPU, and which any AdamW advances once for each parameter group: the bias correction is then off, and the second
    loss after such a load by 1e-4 of itself.
    """
    trainer, fused = config.trainer, is_fused(config)
    for group, decay in zip(engine.optimizer.param_groups, (trainer.weight_decay, 0.0), strict=True):
        group["betas"] = (trainer.adam_beta1, trainer.adam_beta2)
        group["eps"] = trainer.adam_eps
        group["weight_decay"] = decay
        group["fused"], group["foreach"] = fused, None
    for parameter, state in engine.optimizer.optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            device = parameter.device if fused else torch.device("cpu")
            state["step"] = state["step"].to(device, torch.float32, copy=True)


def place_spectrum(engine: Any) -> None:
    """Install the float32 spectrum and assert it; after the engine is built and after every load."""
    lm = engine.module.lm
    install_spectrum(lm)
    assert_spectrum(lm, position_of(lm.config).spectrum())
