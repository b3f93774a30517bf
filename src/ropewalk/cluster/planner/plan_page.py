"""A plan as a page of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ropewalk.cluster.planner.memory import GIB
from ropewalk.cluster.planner.plan import DAY, HOUR, Plan, gib, make_plan
from ropewalk.config.train import PlanConfig
from ropewalk.errors import UserError

GB = 1e9


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
        path.write_text(json.dumps(content, indent=2) + "\n")
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
        f"plan: {e['run_name']} on {e['gpus']} x {e['cluster']} {'fits' if plan.fits else 'DOES NOT FIT'} "
        f"({plan.memory.device_total / GIB:.1f} of {capacity} GiB), {_duration(e['seconds'])}, "
        f"{_hours(e['gpu_hours'])} GPU-hours, {e['cost']:,.0f} at the cluster's price"
        + "".join(f"; would fit: {' '.join(chosen)}" for chosen in plan.changes[:1])
    )


def lines(plan: Plan, config: PlanConfig) -> list[str]:
    """The page, line by line."""
    e = plan.entries
    return [
        f"{e['run_name']}: {_count(e['parameters'])} parameters, {plan.setting.length:,} tokens a sequence, "
        f"{e['gpus']} x {e['cluster']}",
        "",
        *_memory_lines(plan, config),
        "",
        *_time_lines(plan, e),
        "",
        *_disk_lines(plan, e),
    ]


def _memory_lines(plan: Plan, config: PlanConfig) -> list[str]:
    capacity, total = config.cluster.gpu_memory_gib, plan.memory.device_total
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    at = {"loss": "in the loss", "layer": "in the backward pass of a layer"}
    at |= {"reduce": "at the end of the backward pass", "step": "in the optimizer's step"}
    found = [
        f"memory of a GPU: {gib(total)} of {capacity} GiB ({total / GIB / capacity:.0%}): {verdict}; "
        f"the peak is {at[plan.memory.phase]}",
        *(f"  {name:<22} {gib(size):>12}" for name, size in plan.memory.parts.items() if size >= 2**20),
    ]
    ranks = min(plan.setting.ranks, config.cluster.gpus_per_node)
    if plan.memory.host:
        per_node = plan.memory.host_total * ranks
        found.append(f"memory of a host: {gib(per_node)} of {config.cluster.host_memory_gib:,} GiB")
    found.append("the same run with                  GPU         host")
    for name, way in plan.ways.items():
        note = ("" if way.fits else "  does not fit") + ("  (configured)" if way.configured else "")
        found.append(f"  {name:<24} {gib(way.device_total):>12} {gib(way.host_total * ranks):>12}{note}")
    if plan.smallest is None:
        found.append("no sequence-parallel degree fits with a micro batch of 1")
    else:
        found.append(
            f"smallest that fits: parallel.sequence={plan.smallest[0]}, there up to "
            f"trainer.micro_batch_size={plan.smallest[1]}"
        )
    if not plan.fits:
        found.append("cheapest changes that would fit:" if plan.changes else "no change known here would make it fit")
        found += [f"  {' '.join(chosen)}" for chosen in plan.changes]
    return found


def _time_lines(plan: Plan, e: Any) -> list[str]:
    flops = {name: _count(1e9 * value) for name, value in e["gflops_per_token"].items()}
    return [
        f"step: {e['tokens_per_step']:,} tokens in {e['accumulation_steps']} micro batches a rank; "
        f"{e['steps']:,} steps, {_count(e['tokens'])} tokens",
        f"work: {flops['linear']} FLOPs a token in linear layers, {flops['causal']} in causal attention "
        f"({flops['full']} counted in full)",
        f"speed: {e['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU, if {e['utilisation']:.0%} of the peak is "
        "reached (assume.utilisation)",
        f"time: {_duration(e['step_seconds'])} a step, {_duration(e['seconds'])} in all, "
        f"{_hours(e['gpu_hours'])} GPU-hours, "
        f"{e['cost']:,.0f} at the cluster's price",
        f"communication: {e['communication_seconds']:.1f} s of a micro batch's {e['micro_step_seconds']:.1f} s, if "
        "none of it is hidden",
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
