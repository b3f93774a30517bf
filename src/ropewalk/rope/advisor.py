"""What a model's spectrum allows: which pairs training never turned, which clip follows, and what to look out for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ropewalk.rope.chain import RopeChain
from ropewalk.rope.foreign import REFERENCE_KEYS, read_foreign
from ropewalk.rope.methods.clipping import recommended_clip
from ropewalk.rope.methods.scaling import yarn_ramp_ends
from ropewalk.rope.notation import print_value
from ropewalk.rope.position import METADATA_KEY, Position
from ropewalk.rope.registry import get_method

CLIPS = ("cope", "hardclip")
LARGEST_CLIP = 0.75  # of all pairs
NEEDS_ORIGINAL = ("yarn", "llama3", "longrope", "su")


def critical_dimension(head_dim: int, theta: float, length: int) -> int:
    """Channels whose pairs finish a turn in ``length`` tokens: 2 ceil((d/2) log_b(L / 2 pi)), within 0..d.

    "Scaling Laws of RoPE-based Extrapolation" (arXiv 2310.05209): 70 for Llama-3, base 5e5 at 8,192 tokens.
    """
    return min(max(2 * math.ceil(head_dim / 2 * math.log(length / (2 * math.pi), theta)), 0), head_dim)


@dataclass(frozen=True)
class Beyond:
    """Pairs that never finish a turn, with the base and the length (tokens) that say so."""

    theta: float
    length: int
    pairs: int

    def __str__(self) -> str:
        return f"{self.pairs} pairs at base {print_value(self.theta)} and {self.length:,} tokens"


@dataclass(frozen=True)
class Choice:
    """What one choice does to the slowest pairs.

    Attributes:
        chain: what follows the start, printed; the whole chain where it replaces the start.
        stopped: pairs that do not rotate.
        slowest_period: tokens in a turn of the slowest pair that rotates; infinite where none does.
        unfinished: rotating pairs that never finish a turn in the training length.
        new_phases: pairs that reach phases at the target length which training at the training length did not.
        new_turns: how far, in turns, summed over those pairs.
    """

    chain: str
    stopped: int
    slowest_period: float
    unfinished: int
    new_phases: int
    new_turns: float


@dataclass(frozen=True)
class Advice:
    """The advisor's findings.

    Attributes:
        position: how the model rotates now.
        start: the chain that the run starts from, before any choice.
        train_length: tokens that the run would train at.
        target_length: tokens to serve.
        critical_dimension: of the model's own base and pretrained length, channels.
        beyond: out-of-distribution pairs: own base and pretrained length; new base, at it and at the training length.
        clip: the recommended clip, pairs.
        clip_at: the pairs, base and length it follows from.
        yarn_factor: target over training length.
        yarn_ramp: pair indices between which YaRN's ramp rises, from the training length.
        choices: what each does to the slowest periods.
        warnings: what to look out for.
    """

    position: Position
    start: RopeChain
    train_length: int
    target_length: int
    critical_dimension: int
    beyond: tuple[Beyond, ...]
    clip: int
    clip_at: Beyond
    yarn_factor: float
    yarn_ramp: tuple[float, float]
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...]


def advise(
    position: Position,
    *,
    theta: float | None = None,
    train_length: int | None = None,
    target_length: int | None = None,
    chain: RopeChain | None = None,
    config: Mapping[str, Any] | None = None,
) -> Advice:
    """What to choose for a model, and what to look out for.

    Args:
        position: how the model rotates; Position.from_pretrained reads it off a config.json.
        theta: base the run would change to; None: the model's own chain stays.
        train_length: tokens the run would train at; None: no training, the model's trained length.
        target_length: tokens to serve; None: four times the training length.
        chain: a chain to judge beside the advisor's own choices; appended to what the run starts from, or in place of
            it where it lays the spectrum out anew.
        config: config.json's content, for warnings that only it can tell.

    Raises:
        ValueError: for a length or base out of range.
    """
    train_length = train_length or position.trained_length
    target_length = target_length or 4 * train_length
    if target_length < train_length:
        raise ValueError(
            f"target_length={target_length} is below train_length={train_length}; name the length to serve, at least "
            "that"
        )
    start = RopeChain([{"method": "abf", "theta": theta}]) if theta else position.chain
    run = replace(position, chain=start, trained_length=train_length)
    now, base = position.spectrum(), run.spectrum()
    counted = [(now, position.pretrained_length), (base, position.pretrained_length), (base, train_length)]
    clip = recommended_clip(base)
    factor = target_length / train_length
    arms = _arms(run, clip, factor, chain)
    return Advice(
        position=position,
        start=start,
        train_length=train_length,
        target_length=target_length,
        critical_dimension=critical_dimension(position.head_dim, position.theta, position.pretrained_length),
        beyond=tuple(dict.fromkeys(Beyond(s.theta, length, s.pairs_beyond(length)) for s, length in counted)),
        clip=clip,
        clip_at=Beyond(base.theta, train_length, base.pairs_beyond(train_length)),
        yarn_factor=factor,
        yarn_ramp=yarn_ramp_ends(base, train_length),
        choices=tuple(_choice(start, arm, served, target_length) for arm, served in arms),
        warnings=tuple(_warnings([p for arm in arms for p in arm], start, clip, config or {})),
    )


def _arms(run: Position, clip: int, factor: float, chain: RopeChain | None) -> list[tuple[Position, Position]]:
    """Each choice as it is trained and as it is served: the run's start, both clips, and YaRN at test time."""
    hardclip, cope = (run.extended([{"method": name, "clip": clip}]) for name in ("hardclip", "cope"))
    arms = [(run, run), (hardclip, hardclip), (cope, cope)]
    if not _scalings(run.chain):
        yarn = {"method": "yarn", "factor": factor, "original_max_position_embeddings": run.trained_length}
        arms += [(run, run.extended([yarn])), (cope, cope.extended([yarn]))]
    if chain is not None:
        own = replace(run, chain=chain) if chain.rebuilds else run.extended(chain.to_list())
        arms.append((own, own))
    return arms


def _choice(start: RopeChain, trained: Position, served: Position, target_length: int) -> Choice:
    follows = served.chain.steps[: len(start.steps)] == start.steps
    added = served.chain.steps[len(start.steps) :] if follows else served.chain.steps
    at_training, at_target = trained.spectrum(), served.spectrum(length=target_length)
    turning = at_target.inv_freq[at_target.inv_freq > 0]
    seen = np.minimum(at_training.turns(trained.trained_length), 1.0)
    reached = np.minimum(at_target.turns(target_length), 1.0)
    return Choice(
        chain=" > ".join(map(str, added)) or "as it is",
        stopped=int((at_target.inv_freq == 0).sum()),
        slowest_period=float(2 * np.pi / turning.min()) if turning.size else math.inf,
        unfinished=int(((at_training.inv_freq > 0) & (at_training.turns(trained.trained_length) < 1)).sum()),
        new_phases=int((reached > seen * (1 + 1e-9)).sum()),
        new_turns=float(np.maximum(reached - seen, 0.0).sum()),
    )


def _warnings(arms: Sequence[Position], start: RopeChain, clip: int, config: Mapping[str, Any]) -> Iterator[str]:
    pairs = arms[0].head_dim // 2
    largest = max([clip, *(s.arguments["clip"] for arm in arms for s in arm.chain.steps if s.method in CLIPS)])
    if largest > LARGEST_CLIP * pairs:
        yield (
            f"a clip of {largest} is above 75% of all {pairs} pairs, so little is left to tell positions apart; raise "
            "theta or the training length, or clip less"
        )
    if any(_clip_under(arm.chain, "llama3") for arm in arms):
        yield (
            "a clip under llama3 scaling: llama3 scales by wavelength and the clip by index, so their order matters "
            "and no published run has both; start from abf, which replaces the scaling, or test both orders"
        )
    if any(_clip_under(arm.chain, "yarn") for arm in arms):
        yield (
            "a clip under full YaRN: YaRN interpolates the pairs that the clip has slowed already and adds its "
            "attention scaling; evaluate the clipped model with and without it (test_time=none)"
        )
    if _scalings(start):
        yield (
            f"the model is scaled already ({start}); YaRN's choices are left out, since a second scaling must start "
            "from the length that the first one reached"
        )
    yield from _config_warnings(config)


def _config_warnings(config: Mapping[str, Any]) -> Iterator[str]:
    """What only config.json tells."""
    if not config or config.get(METADATA_KEY):
        return
    foreign = read_foreign(config)
    kind = foreign.entry.get("rope_type") or foreign.entry.get("type")
    names = ("original_max_position_embeddings" in place for place in (foreign.entry, config))
    if kind in NEEDS_ORIGINAL and not any(names):
        yield (
            f"rope_type={kind} without original_max_position_embeddings: transformers takes max_position_embeddings="
            f"{foreign.trained_length:,} in its place without a word; write the length the model was trained at"
        )
    present = [key for key in REFERENCE_KEYS if key in config]
    if present:
        yield (
            f"{' and '.join(f'{key}={config[key]}' for key in present)}: CoPE's published code reads these; stock "
            "engines ignore them and rotate without the clip. Export the model through a chain with cope(clip=...)"
        )


def _clip_under(chain: RopeChain, scaling: str) -> bool:
    methods = {step.method for step in chain.steps}
    return scaling in methods and not methods.isdisjoint(CLIPS)


def _scalings(chain: RopeChain) -> bool:
    return any(get_method(step.method).scaling for step in chain.steps)
