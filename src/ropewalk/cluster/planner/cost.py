"""Time, money and disk of a run. docs/planner.md has the formulas in words, with their sources."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from ropewalk.cluster.planner.memory import ADAM, FP32, Setting, attended_key
from ropewalk.cluster.planner.shape import ModelShape
from ropewalk.config.groups import ClusterConfig
from ropewalk.config.train import AssumptionConfig, TrainerConfig
from ropewalk.flops import all_pairs, causal_pairs, mean_pairs, sequence_flops

GB = 1e9
# Speeds of an H100 and bytes of its memory that are moved. FlashAttention's forward is of arXiv 2407.08608 (16k tokens,
# head_dim 128, causal). The others are assumed: seconds of a 64k row of Llama-3-8B times 3.35 TB/s. No run here has
# measured any of them.
PEAK = 989.4e12  # dense bf16
PRODUCTS = 620e12  # matrix products
FLASH_2 = (370e12, 300e12)  # forward, backward
FLASH_3 = (620e12, 500e12)
ATTENTION = {"auto": FLASH_2, "torch": FLASH_2, "fa2": FLASH_2, "fa3": FLASH_3, "fa4": FLASH_3}  # auto: the least
MOST_OF_PEAK = 0.6  # FlashAttention-2 on other GPUs: 50 to 73% of an A100's peak (arXiv 2307.08691)
ELEMENTWISE = 1.5 * 3.35e12 / (32 * 65_536 * 4096)  # a layer, token and channel: norms, gate, rotation, sums
COMPILED = 0.7 / 1.5  # of which trainer.compile leaves
LOSS = 0.25 * 3.35e12 / (65_536 * 128_256)  # a logit, beside its matrix products
HOST_COPY = 53e9  # bytes/s between GPU and host
CPU_UTILISATION = 0.28  # share of a CPU's peak
LEAD_MARGIN = 30.0  # seconds for the signal to reach every rank, and for the job to be requeued


@dataclass(frozen=True)
class Flops:
    """FLOPs a token, forward and backward, by part."""

    linear: float
    causal: float  # attention over one document that fills the row
    full: float  # attention counted over all pairs


@dataclass(frozen=True)
class Time:
    """Seconds, and what follows from them.

    Attributes:
        micro_step: forward and backward of one micro batch.
        step: one optimizer step.
        training: all steps, and the checkpoints between them.
        communication: of one step, if none of it is hidden behind computing.
        tokens_per_second_per_gpu: while micro batches are computed.
        utilisation: share of the peak that this is, counting causal attention over whole rows and nothing twice.
    """

    micro_step: float
    step: float
    training: float
    communication: float
    tokens_per_second_per_gpu: float
    utilisation: float


def flops_per_token(shape: ModelShape, length: int) -> Flops:
    """FLOPs a token of a row of ``length`` tokens; a layer with a window counts the pairs within it."""
    linear = sequence_flops(shape.linear, shape.attention_width, length, 0)
    layers, width = shape.layers_by_window, shape.attention_width
    causal = sequence_flops(0, width, length, mean_pairs(layers, partial(causal_pairs, length)))
    full = sequence_flops(0, width, length, mean_pairs(layers, partial(all_pairs, length)))
    return Flops(linear / length, causal / length, full / length)


def checkpoint_bytes(parameters: float, stage: int, element: int) -> float:
    """Master weights and both moments, in fp32; under ZeRO-1 and -2 the weights as they are computed with, too.

    Args:
        parameters: of the model.
        stage: of ZeRO.
        element: bytes of a parameter.
    """
    return parameters * (FP32 + ADAM + (element if stage < 3 else 0))


def checkpoint_seconds(shape: ModelShape, setting: Setting, cluster: ClusterConfig, assume: AssumptionConfig) -> float:
    """Writing at what the nodes' file system takes, then hashing what each rank wrote."""
    size = checkpoint_bytes(shape.parameters, setting.stage, setting.element)
    nodes = max(1, setting.ranks // cluster.gpus_per_node)
    return size / (GB * cluster.disk_write_gb_s * nodes) + size / (GB * assume.hash_gb_s * setting.ranks)


def checkpoints_kept(trainer: TrainerConfig) -> int:
    """Checkpoints on disk at the end of the run; one more exists while it is written."""
    every, steps = trainer.checkpoint_every, trainer.max_steps
    if every is None:
        return 0
    saved = {*range(every, steps + 1, every), steps}
    if trainer.keep_last is None:
        return len(saved)
    newest = set(sorted(saved)[-trainer.keep_last :])
    return len(newest | {step for step in saved if trainer.keep_every and step % trainer.keep_every == 0})


def communication_seconds(
    shape: ModelShape, setting: Setting, cluster: ClusterConfig, accumulation_steps: int
) -> float:
    """Of one step. Ulysses trades heads in every micro batch; what ZeRO sends depends on its stage.

    ZeRO-3 gathers the weights twice in every micro batch and scatters fp32 gradients. ZeRO-2 adds those up on all ranks
    (DeepSpeed's ``use_multi_rank_bucket_allreduce``), which is a scatter and a gather of them, and gathers the new
    weights once a step. ZeRO-1 does each once a step.

    Every byte enters a GPU over NVLink; what another node holds enters the node once, spread over its GPUs' ports.
    Ulysses' exchange goes from GPU to GPU, between nodes through each one's own port. The rank that has the fewest of
    its group on its node waits longest: the greatest common divisor of the group's size and the node's.
    """
    ranks, nodes = setting.ranks, max(1, setting.ranks // cluster.gpus_per_node)
    per_parameter = {
        1: 2 * FP32 + setting.element,
        2: accumulation_steps * 2 * FP32 + setting.element,
        3: accumulation_steps * (2 * setting.element + FP32),
    }
    zero = per_parameter[setting.stage] * shape.parameters
    inside = zero * (ranks - 1) / ranks / (GB * cluster.nvlink_gb_s)
    between = zero * (nodes - 1) / nodes / (GB * cluster.network_gb_s * cluster.gpus_per_node)
    passes = (3 if setting.checkpointing else 2) * accumulation_steps
    traded = passes * shape.layers * setting.tokens * setting.element * 2 * (shape.query + attended_key(shape, setting))
    beside = setting.sequence if nodes == 1 else math.gcd(setting.sequence, cluster.gpus_per_node)
    from_node = traded * (beside - 1) / setting.sequence / (GB * cluster.nvlink_gb_s)
    from_others = traded * (setting.sequence - beside) / setting.sequence / (GB * cluster.network_gb_s)
    return max(inside, between) + max(from_node, from_others)


def token_seconds(shape: ModelShape, setting: Setting, trainer: TrainerConfig, cluster: ClusterConfig) -> float:
    """Seconds of a GPU for one token, forward and backward: its operations at the speeds above, one after the other.

    Matrix products run three times, forward and for two gradients; with checkpointing those of the layers once more,
    and those of a tiled MLP yet again. The backward pass of attention counts 2.5 of its forward ones, as it computes
    the logits again. Communication is hidden.
    """
    speed = cluster.peak_tflops * 1e12 / PEAK
    layers, mlp = shape.layers * shape.linear_per_layer, shape.layers * 3 * shape.hidden * shape.intermediate
    again = (layers if setting.checkpointing else 0) + (mlp if setting.mlp_tile is not None else 0)
    products = 2 * (3 * shape.linear + again) / (PRODUCTS * speed)
    most = MOST_OF_PEAK * cluster.peak_tflops * 1e12
    forward, backward = (min(rate, most) for rate in ATTENTION[trainer.attention])
    once = flops_per_token(shape, setting.length).causal / 3
    runs = 2 if setting.checkpointing and not setting.keep_attention else 1
    attention = once * (runs / forward + 2.5 / backward)
    elementwise = ELEMENTWISE * (COMPILED if trainer.compile else 1) * shape.layers * shape.hidden
    copied = 2 * shape.layers * setting.element * shape.hidden if setting.offload_activations else 0
    moved = (elementwise + LOSS * shape.vocabulary) / (1e12 * cluster.memory_tb_s)
    return products + attention + moved + copied / HOST_COPY


def run_time(
    shape: ModelShape,
    setting: Setting,
    trainer: TrainerConfig,
    cluster: ClusterConfig,
    assume: AssumptionConfig,
    accumulation_steps: int,
) -> Time:
    """How long the run takes if nothing fails, by the speeds above, or by ``assume.utilisation`` of the peak."""
    flops = flops_per_token(shape, setting.length)
    at_peak = cluster.peak_tflops * 1e12 / (flops.linear + flops.causal)
    utilisation = assume.utilisation if setting.cuda or assume.utilisation is not None else CPU_UTILISATION
    speed = 1 / token_seconds(shape, setting, trainer, cluster) if utilisation is None else utilisation * at_peak
    micro_step = setting.tokens / speed
    step = accumulation_steps * micro_step + assume.step_overhead
    every = trainer.checkpoint_every
    saves = math.ceil(trainer.max_steps / every) if every else 0
    saving = saves * checkpoint_seconds(shape, setting, cluster, assume)
    communication = communication_seconds(shape, setting, cluster, accumulation_steps)
    return Time(micro_step, step, trainer.max_steps * step + saving, communication, speed, speed / at_peak)


def lead_seconds(micro_step: float, save: float) -> int:
    """How long before the time limit SLURM should send its signal (``--signal=B:USR1@N``).

    Ranks look for it before each micro batch, so the last one of a step may just have begun; then come the optimizer's
    step and the save. Twice that, since a busy file system is slow, and a margin; in tens of seconds. Also for times
    that were measured.

    Args:
        micro_step: seconds of one micro batch's forward and backward, and of the optimizer's step.
        save: seconds of one checkpoint.
    """
    return 10 * math.ceil((2 * (micro_step + save) + LEAD_MARGIN) / 10)


def kv_bytes(shape: ModelShape, length: int, element: int = 2) -> float:
    """Keys and values of one sequence, in bf16 unless ``element`` says otherwise; a window keeps its own alone."""
    kept = sum(count * min(length, window or length) for window, count in shape.layers_by_window.items())
    return 2.0 * shape.key * element * kept
