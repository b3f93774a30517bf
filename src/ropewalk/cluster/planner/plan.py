"""One run planned: memory, time, money, disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ropewalk.cluster.planner import cost
from ropewalk.cluster.planner.assumptions import check_inputs
from ropewalk.cluster.planner.fit import Capacity, cheapest_changes, other_ways, sequence_degrees, smallest_fit
from ropewalk.cluster.planner.memory import GIB, Allowances, Memory, Setting, memory
from ropewalk.cluster.planner.shape import ModelShape, shape_of
from ropewalk.config.rules import validate_train
from ropewalk.config.train import PlanConfig
from ropewalk.errors import UserError

DAY, HOUR = 86_400, 3_600


@dataclass(frozen=True)
class Variant:
    """The run with something held in another way, or as it is configured.

    Attributes:
        device_total: bytes on a GPU.
        host_total: bytes in host memory, for one rank.
        fits: whether GPU and host have room.
        configured: whether it is the run's own.
    """

    device_total: float
    host_total: float
    fits: bool
    configured: bool


@dataclass(frozen=True)
class Plan:
    """The answer of ``scripts/plan.py``; sizes in bytes, times in seconds unless the name says otherwise.

    Attributes:
        fits: whether every GPU and host has room for what is configured.
        ways: the same run with activations, loss or optimizer held in each way, by name.
        smallest: (sequence-parallel degree, micro batch) that fits at least, or None.
        changes: sets of overrides that would make it fit, cheapest first; empty where it fits.
        lead_seconds: how long before the time limit the save signal should come.
        entries: everything else, by name, as it goes to JSON.
    """

    fits: bool
    memory: Memory
    setting: Setting
    shape: ModelShape
    ways: Mapping[str, Variant]
    smallest: tuple[int, int] | None
    changes: list[list[str]]
    lead_seconds: int
    entries: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "fits": self.fits,
            "memory": {**asdict(self.memory), "device_total": self.memory.device_total},
            "ways": {name: asdict(way) for name, way in self.ways.items()},
            "smallest_sequence": self.smallest[0] if self.smallest else None,
            "smallest_micro_batch": self.smallest[1] if self.smallest else None,
            "changes": self.changes,
            "lead_seconds": self.lead_seconds,
            **self.entries,
        }


def setting_of(config: PlanConfig) -> Setting:
    """The part of the configuration that the memory depends on."""
    trainer = config.trainer
    return Setting(
        ranks=config.nodes * config.cluster.gpus_per_node,
        length=config.data.sequence_length,
        micro_batch=trainer.micro_batch_size,
        sequence=config.parallel.sequence,
        element=2 if trainer.dtype == "bfloat16" else 4,
        stage=config.deepspeed.stage,
        cuda=config.cluster.device == "cuda",
        checkpointing=trainer.activation_checkpointing,
        offload_activations=trainer.offload_activations,
        mlp_tile=trainer.mlp_chunk_size,
        loss_chunk=trainer.loss_chunk_size,
        offload_optimizer=config.deepspeed.offload_optimizer,
        save_in_background=trainer.save_in_background,
    )


def make_plan(config: PlanConfig) -> Plan:
    """Plan a run from its configuration alone.

    Raises:
        UserError: for a run that could not be started on these machines whatever its memory, a model of unknown size,
            or numbers of machines that no machine has.
    """
    check_inputs(config)
    setting, trainer, cluster = setting_of(config), config.trainer, config.cluster
    validate_train(config, setting.ranks, stores=False)
    shape = shape_of(config.model)
    degrees = sequence_degrees(shape, setting, cluster.gpus_per_node, trainer.global_batch_size)
    if setting.sequence not in degrees:
        fitting = [str(degree) for degree in degrees if replace(setting, sequence=degree).even]
        raise UserError(
            f"parallel.sequence={setting.sequence} does not share {shape.heads} query and {shape.kv_heads} key/value "
            f"heads evenly inside a node of {cluster.gpus_per_node}; "
            + (f"use one of {', '.join(fitting)}" if fitting else "use fewer nodes, or a larger global batch")
        )
    capacity = Capacity(
        cluster, Allowances(config.assume.context_gib, config.assume.nccl_gib, config.assume.fragmentation)
    )
    needed = memory(shape, setting, capacity.allowances)
    fits = capacity.has_room(needed, setting)
    batch = trainer.global_batch_size
    changes = [] if fits else cheapest_changes(shape, setting, capacity, batch, degrees, config.nodes)
    time = cost.run_time(shape, setting, trainer, cluster, config.assume)
    save = cost.checkpoint_seconds(shape, setting, cluster, config.assume)
    return Plan(
        fits=fits,
        memory=needed,
        setting=setting,
        shape=shape,
        ways=_ways(shape, setting, capacity),
        smallest=smallest_fit(shape, setting, capacity, batch, degrees),
        changes=[[change.override for change in chosen] for chosen in changes],
        lead_seconds=cost.lead_seconds(time.micro_step + config.assume.step_overhead, save),
        entries=_entries(config, shape, setting, time, save),
    )


def _ways(shape: ModelShape, setting: Setting, capacity: Capacity) -> dict[str, Variant]:
    found = {}
    for name, way in other_ways(setting).items():
        needed = memory(shape, way, capacity.allowances)
        found[name] = Variant(needed.device_total, needed.host_total, capacity.has_room(needed, way), way == setting)
    return found


def _entries(config: PlanConfig, shape: ModelShape, setting: Setting, time: cost.Time, save: float) -> dict[str, Any]:
    trainer, cluster = config.trainer, config.cluster
    tokens = trainer.global_batch_size * setting.length
    hours = time.training / HOUR * setting.ranks
    kept = cost.checkpoints_kept(trainer)
    size = cost.checkpoint_bytes(shape)
    flops = cost.flops_per_token(shape, setting.length)
    return {
        "run_name": config.run_name,
        "cluster": cluster.name,
        "gpus": setting.ranks,
        "parameters": shape.parameters,
        "gflops_per_token": {name: value / 1e9 for name, value in asdict(flops).items()},
        "gpu_memory_gib": cluster.gpu_memory_gib,
        "accumulation_steps": cost.accumulation_steps(setting, trainer.global_batch_size),
        "tokens_per_step": tokens,
        "steps": trainer.max_steps,
        "tokens": tokens * trainer.max_steps,
        "utilisation": config.assume.utilisation,
        "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu,
        "micro_step_seconds": time.micro_step,
        "communication_seconds": time.communication,
        "step_seconds": time.step,
        "seconds": time.training,
        "gpu_hours": hours,
        "cost": hours * cluster.price_per_gpu_hour,
        "checkpoint_bytes": size,
        "checkpoint_seconds": save,
        "checkpoints_kept": kept,
        "storage_bytes": size * (kept + (1 if kept else 0)) + setting.element * shape.parameters,
        "weights_bytes": 2 * shape.parameters,
        "kv_bytes": {length: cost.kv_bytes(shape, length) for length in sorted({*config.kv_lengths, setting.length})},
    }


def gib(size: float) -> str:
    """Bytes in GiB, as people read them."""
    return f"{size / GIB:,.1f} GiB"
