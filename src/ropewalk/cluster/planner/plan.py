"""One run planned: memory, time, money, disk; as data and as a page of text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ropewalk.cluster.planner import cost
from ropewalk.cluster.planner.fit import Capacity, cheapest_changes, other_ways, sequence_degrees, smallest_fit
from ropewalk.cluster.planner.memory import GIB, Allowances, Memory, Setting, memory
from ropewalk.cluster.planner.shape import ModelShape, shape_of
from ropewalk.config.rules import Batching, batching, validate_numbers, validate_sharing, validate_train
from ropewalk.config.schedule import describe_schedule
from ropewalk.config.train import PlanConfig
from ropewalk.errors import UserError

DAY, HOUR = 86_400, 3_600
GB = 1e9


@dataclass(frozen=True)
class Variant:
    """The run with something held in another way, or as it is configured.

    Attributes:
        device_total: bytes on a GPU.
        host_total: bytes in host memory, for one rank.
        communication: seconds of a step, if none of it is hidden behind computing.
        fits: whether GPU and host have room.
        configured: whether it is the run's own.
    """

    device_total: float
    host_total: float
    communication: float
    fits: bool
    configured: bool


@dataclass(frozen=True)
class Plan:
    """The answer of ``scripts/plan.py``; sizes in bytes, times in seconds unless the name says otherwise.

    Attributes:
        fits: whether every GPU and host has room for what is configured.
        ways: the same run with activations, loss, optimizer or states held in each way, by name.
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
        overlap_comm=config.deepspeed.overlap_comm,
        cuda=config.cluster.device == "cuda",
        checkpointing=trainer.activation_checkpointing,
        offload_activations=trainer.offload_activations,
        keep_attention=trainer.keep_attention,
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
    validate_numbers(config)
    setting, trainer, cluster = setting_of(config), config.trainer, config.cluster
    if trainer.device != cluster.device:
        raise UserError(
            f"trainer.device={trainer.device} on cluster={cluster.name}, whose device is {cluster.device}; set "
            f"trainer.device={cluster.device} or choose another cluster"
        )
    validate_train(config, setting.ranks)
    division = batching(config, setting.ranks)
    shape = shape_of(config.model)
    validate_sharing(setting.sequence, shape.heads, shape.kv_heads)
    degrees = sequence_degrees(shape, setting, trainer.global_batch_size)
    capacity = Capacity(
        cluster, Allowances(config.assume.context_gib, config.assume.nccl_gib, config.assume.fragmentation)
    )
    needed = memory(shape, setting, capacity.allowances)
    fits = capacity.has_room(needed, setting)
    batch = trainer.global_batch_size
    changes = [] if fits else cheapest_changes(shape, setting, capacity, batch, degrees, config.nodes)
    time = cost.run_time(shape, setting, trainer, cluster, config.assume, division.accumulation_steps)
    save = cost.checkpoint_seconds(shape, setting, cluster, config.assume)
    ways = _ways(shape, setting, capacity, division.accumulation_steps)
    return Plan(
        fits=fits,
        memory=needed,
        setting=setting,
        shape=shape,
        ways=ways,
        smallest=smallest_fit(shape, setting, capacity, batch, degrees),
        changes=[[change.override for change in chosen] for chosen in changes],
        lead_seconds=cost.lead_seconds(time.micro_step + config.assume.step_overhead, save),
        entries=_entries(config, shape, setting, division, time, save) | _stages(ways),
    )


def _ways(shape: ModelShape, setting: Setting, capacity: Capacity, accumulation_steps: int) -> dict[str, Variant]:
    variants = {}
    for name, way in other_ways(setting).items():
        needed = memory(shape, way, capacity.allowances)
        talk = cost.communication_seconds(shape, way, capacity.cluster, accumulation_steps)
        fits = capacity.has_room(needed, way)
        variants[name] = Variant(needed.device_total, needed.host_total, talk, fits, way == setting)
    return variants


def _stages(ways: Mapping[str, Variant]) -> dict[str, Any]:
    """Seconds that each ZeRO stage communicates in a step, and the stage that fits with the fewest; None: none fits."""
    seconds = {name: way.communication for name, way in ways.items() if name.startswith("ZeRO")}
    fitting = [name for name in seconds if ways[name].fits]
    return {
        "communication_by_stage": {name: round(value, 4) for name, value in seconds.items()},
        "fastest_stage": min(fitting, key=lambda name: seconds[name]) if fitting else None,
    }


def _entries(
    config: PlanConfig, shape: ModelShape, setting: Setting, division: Batching, time: cost.Time, save: float
) -> dict[str, Any]:
    trainer, cluster = config.trainer, config.cluster
    hours = time.training / HOUR * setting.ranks
    kept = cost.checkpoints_kept(trainer)
    size = cost.checkpoint_bytes(shape.parameters, setting.stage, setting.element)
    flops = cost.flops_per_token(shape, setting.length)
    return {
        "run_name": config.run_name,
        "cluster": cluster.name,
        "gpus": setting.ranks,
        "parameters": shape.parameters,
        "gflops_per_token": {name: value / 1e9 for name, value in asdict(flops).items()},
        "gpu_memory_gib": cluster.gpu_memory_gib,
        **division._asdict(),
        "steps": trainer.max_steps,
        "schedule": describe_schedule(trainer),
        "tokens": division.tokens_per_step * trainer.max_steps,
        "utilisation": time.utilisation,
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


def print_plan(config: PlanConfig) -> bool:
    """Print the plan, or the one entry ``config.print``; returns whether it fits, or need not, or was not asked.

    Raises:
        UserError: as of make_plan, and for a ``print`` that names no entry.
    """
    plan = make_plan(config)
    content = plan.to_json()
    if config.output is not None:
        path = Path(config.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if config.print is None:
        print(summary(plan, config) if config.brief else "\n".join(lines(plan, config)))
        return plan.fits or config.advisory
    if config.print not in content:
        raise UserError(f"print={config.print} is not an entry of a plan; use one of: {', '.join(content)}")
    print(json.dumps(content[config.print]))
    return True


def summary(plan: Plan, config: PlanConfig) -> str:
    """The plan in one line."""
    e, capacity = plan.entries, config.cluster.gpu_memory_gib
    return (
        f"plan: {e['run_name']} on {_devices(e)} {'fits' if plan.fits else 'DOES NOT FIT'} "
        f"({plan.memory.device_total / GIB:.1f} of {capacity} GiB), {_duration(e['seconds'])}, "
        f"{_hours(e['gpu_hours'])} GPU-hours, {e['cost']:,.0f} at the cluster's price"
        + "".join(f"; would fit: {' '.join(chosen)}" for chosen in plan.changes[:1])
    )


def _devices(entries: Mapping[str, Any]) -> str:
    """GPUs, or the processes of a CPU run, by their kind of node."""
    return f"{entries['gpus']} device{'s' if entries['gpus'] != 1 else ''} of {entries['cluster']}"


def lines(plan: Plan, config: PlanConfig) -> list[str]:
    """The page, line by line."""
    e = plan.entries
    return [
        f"{e['run_name']}: {_count(e['parameters'])} parameters, {plan.setting.length:,} tokens a sequence, "
        f"{_devices(e)}",
        "",
        *_memory_lines(plan, config),
        "",
        *_time_lines(plan, config),
        "",
        *_disk_lines(plan, e),
    ]


def _memory_lines(plan: Plan, config: PlanConfig) -> list[str]:
    capacity, total = config.cluster.gpu_memory_gib, plan.memory.device_total
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    at = {"loss": "in the loss", "layer": "in the backward pass of a layer"}
    at |= {"reduce": "at the end of the backward pass", "step": "in the optimizer's step"}
    page = [
        f"memory of a GPU: {gib(total)} of {capacity} GiB ({total / GIB / capacity:.0%}): {verdict}; "
        f"the peak is {at[plan.memory.phase]}",
        *(f"  {name:<22} {gib(size):>12}" for name, size in plan.memory.parts.items() if size >= 2**20),
    ]
    ranks = min(plan.setting.ranks, config.cluster.gpus_per_node)
    if plan.memory.host:
        per_node = plan.memory.host_total * ranks
        page.append(f"memory of a host: {gib(per_node)} of {config.cluster.host_memory_gib:,} GiB")
    page.append("the same run with                  GPU         host")
    for name, way in plan.ways.items():
        note = ("" if way.fits else "  does not fit") + ("  (configured)" if way.configured else "")
        page.append(f"  {name:<24} {gib(way.device_total):>12} {gib(way.host_total * ranks):>12}{note}")
    if plan.smallest is None:
        page.append("no sequence-parallel degree fits with a micro batch of 1")
    else:
        page.append(
            f"smallest that fits: parallel.sequence={plan.smallest[0]}, there up to "
            f"trainer.micro_batch_size={plan.smallest[1]}"
        )
    if not plan.fits:
        page.append("cheapest changes that would fit:" if plan.changes else "no change known here would make it fit")
        page += [f"  {' '.join(chosen)}" for chosen in plan.changes]
    return page


def _time_lines(plan: Plan, config: PlanConfig) -> list[str]:
    e: Any = plan.entries
    by_kernel = config.assume.utilisation is None and plan.setting.cuda
    assumed = f"by the speeds of its kernels (attention {config.trainer.attention})" if by_kernel else "as assumed"
    flops = {name: _count(1e9 * value) for name, value in e["gflops_per_token"].items()}
    return [
        f"step: {e['tokens_per_step']:,} tokens in {e['accumulation_steps']} micro batches a rank; "
        f"{e['steps']:,} steps, {_count(e['tokens'])} tokens",
        f"schedule: {e['schedule']}",
        f"work: {flops['linear']} FLOPs a token in linear layers, {flops['causal']} in causal attention "
        f"({flops['full']} counted in full)",
        f"speed: {e['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU, {e['utilisation']:.0%} of the peak, {assumed}",
        f"time: {_duration(e['step_seconds'])} a step, {_duration(e['seconds'])} in all, "
        f"{_hours(e['gpu_hours'])} GPU-hours, "
        f"{e['cost']:,.0f} at the cluster's price",
        f"communication: {e['communication_seconds']:.2g} s of a step's {e['step_seconds']:.2g} s, if none of it is "
        f"hidden; {', '.join(f'{name} {seconds:.2g} s' for name, seconds in e['communication_by_stage'].items())}",
    ]


def _disk_lines(plan: Plan, e: Any) -> list[str]:
    kv = ", ".join(f"{size / GIB:.1f} at {length:,}" for length, size in e["kv_bytes"].items())
    return [
        f"checkpoint: {e['checkpoint_bytes'] / GB:,.1f} GB, written in {_duration(e['checkpoint_seconds'])}; "
        f"{e['checkpoints_kept']} are kept, {e['storage_bytes'] / GB:,.0f} GB for the run at its end",
        f"SLURM's signal: {plan.lead_seconds} s before the time limit (--signal=B:USR1@{plan.lead_seconds})",
        f"to serve: weights {gib(e['weights_bytes'])} in bf16, KV cache of one sequence in GiB: {kv}",
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / HOUR:.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:.1f} days"


def _count(number: float) -> str:
    """A number as 8.03B, 134.5M or 12.3K."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= factor:
            return f"{number / factor:,.2f}{letter}"
    return f"{number:,.0f}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2f}"
