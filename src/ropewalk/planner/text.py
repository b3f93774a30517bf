"""A plan as a page of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ropewalk.config import PlanConfig
from ropewalk.planner.plan import HOUR, Plan, gib, make_plan

GB = 1e9


def print_plan(config: PlanConfig) -> bool:
    """Print the plan, or the one entry ``only``; returns whether it fits (or is only advice).

    Raises:
        ValueError: as of make_plan, and for an ``only`` that names no entry.
    """
    plan = make_plan(config)
    content = plan.to_json()
    if config.output is not None:
        path = Path(config.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    if config.only is None:
        print("\n".join(lines(plan, config)))
    elif config.only in content:
        print(json.dumps(content[config.only]))
    else:
        raise ValueError(f"only={config.only} is no entry of a plan; use one of: {', '.join(content)}")
    return plan.fits or config.advisory


def lines(plan: Plan, config: PlanConfig) -> list[str]:
    """The page, line by line."""
    e = plan.entries
    return [
        f"{e['run_name']}: {e['parameters'] / 1e9:,.2f}B parameters, {plan.setting.length:,} tokens a sequence, "
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
        f"memory of a GPU: {gib(total)} of {capacity} GiB ({total / 2**30 / capacity:.0%}): {verdict}; "
        f"the peak is {at[plan.memory.phase]}",
        *(f"  {name:<22} {gib(size):>12}" for name, size in plan.memory.parts.items() if size >= 2**20),
    ]
    if plan.memory.host:
        per_node = plan.memory.host_total * min(plan.setting.ranks, config.cluster.gpus_per_node)
        found.append(f"memory of a host: {gib(per_node)} of {config.cluster.host_memory_gib:,} GiB")
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
    flops = e["gflops_per_token"]
    return [
        f"step: {e['tokens_per_step']:,} tokens in {e['accumulation_steps']} micro batches a rank; "
        f"{e['steps']:,} steps, {e['tokens'] / 1e9:,.2f}B tokens",
        f"work: {flops['linear']:.1f} GFLOP a token in linear layers, {flops['causal']:.1f} in causal attention "
        f"({flops['full']:.1f} counted in full)",
        f"speed: {e['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU, if {e['utilisation']:.0%} of the peak is "
        "reached (assume.utilisation)",
        f"time: {_duration(e['step_seconds'])} a step, {e['days']:.1f} days, {e['gpu_hours']:,.0f} GPU-hours, "
        f"{e['cost']:,.0f} at the cluster's price",
        f"communication: {e['communication_seconds']:.1f} s of a micro batch's {e['micro_step_seconds']:.1f} s, if "
        "none of it is hidden",
    ]


def _disk_lines(plan: Plan, e: Any) -> list[str]:
    kv = ", ".join(f"{size / 2**30:.1f} at {length:,}" for length, size in e["kv_bytes"].items())
    return [
        f"checkpoint: {e['checkpoint_bytes'] / GB:,.1f} GB, written in {_duration(e['checkpoint_seconds'])}; "
        f"{e['checkpoints_kept']} are kept, {e['storage_bytes'] / GB:,.0f} GB for the run at its end",
        f"SLURM's signal: {plan.lead_seconds} s before the time limit (--signal=USR1@{plan.lead_seconds})",
        f"to serve: weights {gib(e['weights_bytes'])} in bf16, KV cache of one sequence in GiB: {kv}",
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.1f} h"
