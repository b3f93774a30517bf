"""The fit of a run: does it fit, the smallest way to make it fit, and the cheapest changes if it does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

from ropewalk.cluster.planner.memory import GIB, Allowances, Memory, Setting, memory
from ropewalk.cluster.planner.shape import ModelShape
from ropewalk.config.groups import ClusterConfig
from ropewalk.config.rules import sharing_degrees

SHOWN = 3  # changes that are offered
TILE = 1024  # tokens whose logits exist at once, where that is offered


@dataclass(frozen=True)
class Capacity:
    """The memory of the machines, and the part of it that is set aside."""

    cluster: ClusterConfig
    allowances: Allowances

    def holds(self, shape: ModelShape, setting: Setting) -> bool:
        """True if every GPU and every host has room for its ranks."""
        return self.has_room(memory(shape, setting, self.allowances), setting)

    def has_room(self, needed: Memory, setting: Setting) -> bool:
        """The same of a memory already computed."""
        per_node = min(setting.ranks, self.cluster.gpus_per_node)
        device, host = needed.device_total, needed.host_total
        if not setting.cuda:  # the memory of both is the same
            device = host = device + host
        in_host = host * per_node <= GIB * self.cluster.host_memory_gib
        return in_host and device <= GIB * self.cluster.gpu_memory_gib


@dataclass(frozen=True)
class Change:
    """One thing that can be changed to save memory.

    Attributes:
        override: as on the command line.
        slowdown: what a step then takes, over what it took; an estimate.
        setting: the change made to a setting.
    """

    override: str
    slowdown: float
    changed: dict[str, object] = field(compare=False)

    def applied(self, setting: Setting) -> Setting:
        """The setting with this change."""
        return replace(setting, **self.changed)  # type: ignore[arg-type]


def sequence_degrees(shape: ModelShape, setting: Setting, global_batch: int) -> list[int]:
    """Ranks that may share a row: equal shares of the heads, with work for all ranks.

    Whether they get equal shares of the tokens depends on the micro batch: Setting.even.
    """
    degrees = [degree for degree in sharing_degrees(shape.heads, shape.kv_heads) if setting.ranks % degree == 0]
    return [degree for degree in degrees if global_batch % (setting.ranks // degree) == 0]


def smallest_fit(
    shape: ModelShape, setting: Setting, capacity: Capacity, global_batch: int, degrees: list[int]
) -> tuple[int, int] | None:
    """The smallest sequence-parallel degree that fits, and the largest micro batch that fits beside it; or None."""
    for degree in degrees:
        share = global_batch // (setting.ranks // degree)
        sizes = [replace(setting, sequence=degree, micro_batch=n) for n in range(1, share + 1) if share % n == 0]
        fitting = [size.micro_batch for size in sizes if size.even and capacity.holds(shape, size)]
        if fitting:
            return degree, max(fitting)
    return None


def other_ways(setting: Setting) -> dict[str, Setting]:
    """The setting with activations, loss, optimizer or states held in each known way, one at a time, by name."""
    ways = {
        "all activations kept": {"checkpointing": False, "offload_activations": False, "keep_attention": False},
        "layer inputs kept": {"checkpointing": True, "offload_activations": False, "keep_attention": False},
        "layer inputs on the host": {"checkpointing": True, "offload_activations": True, "keep_attention": False},
        "attention kept, too": {"checkpointing": True, "keep_attention": True},
        "all logits at once": {"loss_chunk": None},
        "logits in chunks": {"loss_chunk": setting.loss_chunk or TILE},
        "optimizer on the GPU": {"offload_optimizer": False},
        "optimizer on the host": {"offload_optimizer": True},
        **{f"ZeRO-{stage}": {"stage": stage} for stage in (1, 2, 3)},
    }
    if not setting.cuda:  # its host is the device
        ways = {name: changed for name, changed in ways.items() if " on the " not in name}
    return {name: replace(setting, **changed) for name, changed in ways.items()}  # type: ignore[arg-type]


def cheapest_changes(
    shape: ModelShape, setting: Setting, capacity: Capacity, global_batch: int, degrees: list[int], nodes: int
) -> list[tuple[Change, ...]]:
    """Sets of changes that make the run fit and leave its global batch, cheapest first; none holds another or sets
    the same keys."""
    fitting: list[tuple[Change, ...]] = []
    shown: list[tuple[Change, ...]] = []
    options = list(_changes(setting, degrees, nodes, global_batch))
    sets = [chosen for size in (1, 2, 3, 4) for chosen in combinations(options, size) if _one_of_each(chosen)]
    for chosen in sorted(sets, key=lambda changes: (_slowdown(changes), len(changes))):
        if any(set(cheaper) <= set(chosen) for cheaper in fitting) or len(shown) == SHOWN:
            continue
        changed = setting
        for change in chosen:
            changed = change.applied(changed)
        whole = global_batch % (changed.micro_batch * changed.ranks // changed.sequence) == 0
        if whole and changed.even and capacity.holds(shape, changed):
            fitting.append(chosen)
            if all(_keys(cheaper) != _keys(chosen) for cheaper in shown):
                shown.append(chosen)
    return shown


def _changes(setting: Setting, degrees: list[int], nodes: int, global_batch: int) -> Iterator[Change]:
    """The possible changes, each with its cost. The slowdowns are assumed; docs/planner.md lists them."""
    if setting.micro_batch > 1:
        yield Change("trainer.micro_batch_size=1", 1.0, {"micro_batch": 1})
    if setting.loss_chunk is None or setting.loss_chunk > TILE:
        yield Change(f"trainer.loss_chunk_size={TILE}", 1.0, {"loss_chunk": TILE})
    if not setting.checkpointing:
        yield Change("trainer.activation_checkpointing=true", 4 / 3, {"checkpointing": True})
    elif setting.cuda and not setting.offload_activations:
        yield Change("trainer.offload_activations=true", 1.05, {"offload_activations": True})
    if setting.keep_attention:
        yield Change("trainer.keep_attention=false", 1.1, {"keep_attention": False})
    if setting.mlp_tile is None:
        yield Change("trainer.mlp_chunk_size=4096", 1.08, {"mlp_tile": 4096})
    for degree in degrees:
        if degree > setting.sequence:
            slowdown = 1 + 0.02 * math.log2(degree / setting.sequence)
            if degree > setting.ranks // nodes >= setting.sequence:
                slowdown += 0.05  # over the network
            yield Change(f"parallel.sequence={degree}", slowdown, {"sequence": degree})
    for stage in range(setting.stage + 1, 4):
        yield Change(f"deepspeed=zero{stage}", 1.01 ** (stage - setting.stage), {"stage": stage})
    factor = 2
    while setting.cuda and setting.ranks * factor <= global_batch * max(degrees):
        yield Change(f"nodes={nodes * factor}", 1.01**factor, {"ranks": setting.ranks * factor})
        factor *= 2
    if setting.cuda and not setting.offload_optimizer:
        yield Change("deepspeed.offload_optimizer=true", 1.25, {"offload_optimizer": True})


def _one_of_each(changes: tuple[Change, ...]) -> bool:
    """True if no two set the same thing."""
    touched = [field for change in changes for field in change.changed]
    return len(touched) == len(set(touched))


def _keys(changes: tuple[Change, ...]) -> set[str]:
    return {change.override.partition("=")[0] for change in changes}


def _slowdown(changes: tuple[Change, ...]) -> float:
    product = 1.0
    for change in changes:
        product *= change.slowdown
    return product
