"""Advisor: the pairs that training never turned, the clip that follows, each choice's effect, and warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ropewalk.errors import UserError
from ropewalk.rope.chain import RopeChain, clip_of, learned_step, print_value, reached_length
from ropewalk.rope.hf_config import READ_SHARE, REFERENCE_KEYS, SHARE, read_hf_position
from ropewalk.rope.hf_scaling import STRETCHED
from ropewalk.rope.methods.clipping import recommended_clip
from ropewalk.rope.methods.scaling import yarn_ramp_ends
from ropewalk.rope.position import METADATA_KEY, Position
from ropewalk.rope.registry import get_method

LARGEST_CLIP = 0.75  # of all pairs
BAND = 2.205  # training lengths in a turn of the band that learned spectra keep (LeRoPE, arXiv 2607.10134, table 10)
UNTRAINED = {  # model types that are read and advised on, and what training and document attention lack of them
    "gemma2": "soft caps on the logits of attention and head, which its kernels and its loss do not compute",
    "gpt_oss": "attention sinks and a mixture of experts, which its attention and its engine do not compute",
    "gemma3": "a tower of images beside its language model; save that alone (Gemma3ForCausalLM, gemma3_text)",
}
SHORTEST = 7  # tokens: within 2 pi not even RoPE's fastest pair finishes a turn


def critical_dimension(head_dim: int, theta: float, length: int) -> int:
    """Channels whose pairs finish a turn in ``length`` tokens: 2 ceil((d/2) log_b(L / 2 pi)), within 0..d.

    "Scaling Laws of RoPE-based Extrapolation" (arXiv 2310.05209): 70 for Llama-3, base 5e5 at 8,192 tokens.
    """
    return min(max(2 * math.ceil(head_dim / 2 * math.log(length / (2 * math.pi), theta)), 0), head_dim)


@dataclass(frozen=True)
class UnfinishedPairs:
    """Rotating pairs that never finish a turn within a length.

    Attributes:
        theta: base of the spectrum.
        methods: names of the methods over that base; empty for RoPE's own pairs.
        length: tokens.
        pairs: their number.
    """

    theta: float
    methods: tuple[str, ...]
    length: int
    pairs: int

    @classmethod
    def of(cls, position: Position, length: int) -> UnfinishedPairs:
        """Those of the spectrum that ``position`` rotates with."""
        methods = tuple(step.method for step in position.chain.steps if step.method != "abf")
        spectrum = position.spectrum()
        return cls(spectrum.theta, methods, length, spectrum.pairs_beyond(length))

    def __str__(self) -> str:
        under = f" under {' and '.join(self.methods)}" if self.methods else ""
        return f"{self.pairs} pairs at base {print_value(self.theta)}{under} and {self.length:,} tokens"


@dataclass(frozen=True)
class Choice:
    """A choice's effect on the slowest pairs.

    Attributes:
        chain: the methods after the start, printed; the whole chain where it replaces the start.
        stopped: pairs that do not rotate.
        slowest_period: tokens in a turn of the slowest pair that rotates; infinite: none does.
        unfinished: rotating pairs that never finish a turn in the training length.
        new_phases: pairs that reach phases at the target length which training at the training length did not.
        new_turns: turns beyond those phases, summed over these pairs.
    """

    chain: str
    stopped: int
    slowest_period: float
    unfinished: int
    new_phases: int
    new_turns: float


@dataclass(frozen=True)
class LearnedBand:
    """A hypothesis on clips: the pair where a learned spectrum would have its dominant band, and what a clip leaves it.

    Spectra that are learned in training from scratch at 2,048 to 8,192 tokens have one band whose period is near 2.205
    training lengths; without it the loss rises by 0.762 nats, without any other by 0.069 at most (LeRoPE, arXiv
    2607.10134, table 10 and figure 8). Whether a clip that slows this pair costs anything was not tested there.

    Attributes:
        period: 2.205 training lengths, tokens.
        pair: the rotating pair nearest to it on a log scale; None: the period is outside those of the spectrum.
        pair_period: tokens in a turn of ``pair``; of the slowest pair that rotates where there is none.
        weights: each clipped choice, printed, with the factor that its clip leaves the frequency of ``pair``.
    """

    period: float
    pair: int | None
    pair_period: float
    weights: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, positions: Sequence[Position]) -> LearnedBand:
        """That of the first position's spectrum before its clip, and what the clips of all leave of their own."""
        bands = [_band_of(position) for position in positions]
        clips = [(clip_of(position.chain), weight) for position, (_, weight) in zip(positions, bands, strict=True)]
        weights = {str(clip): weight for clip, weight in clips if weight is not None}
        return replace(bands[0][0], weights=tuple(weights.items()))


def _band_of(position: Position) -> tuple[LearnedBand, float | None]:
    """The band of a position's spectrum before its clip, and the factor that the clip leaves it; None without one."""
    clip = clip_of(position.chain)
    steps = [{"method": step.method, **step.arguments} for step in position.chain.steps if step is not clip]
    unclipped = replace(position, chain=RopeChain(steps)).spectrum()
    period = BAND * position.trained_length
    turning = unclipped.periods[np.isfinite(unclipped.periods)]
    if not turning.size or not turning.min() <= period <= turning.max():
        return LearnedBand(period, None, float(turning.max(initial=0.0))), None
    pair = int(np.argmin(np.abs(np.log(unclipped.periods / period))))
    weight = float(position.spectrum().inv_freq[pair] / unclipped.inv_freq[pair])
    return LearnedBand(period, pair, float(unclipped.periods[pair])), None if clip is None else weight


@dataclass(frozen=True)
class Advice:
    """The advisor's findings.

    Attributes:
        position: how the model rotates now.
        start: the chain that the run starts from, before any choice.
        train_length: tokens that the run would train at.
        target_length: tokens to serve.
        critical_dimension: of the pretrained model's base and length, channels.
        beyond: out-of-distribution pairs at the pretrained length: of the pretrained model's base, of the model as it
            is, of the run's start; and of that start at the training length. Each once.
        clip: the recommended clip, pairs; None: the start is clipped, or has stopped pairs, already.
        clip_at: the pairs, base and length it follows from.
        yarn_from: tokens that YaRN would stretch: the training length, or the length that a scaling in the start has
            reached.
        yarn_factor: target length over that; 1 or less: there is nothing to stretch.
        yarn_ramp: pair indices between which YaRN's ramp rises; None: the pairs follow no base (RoPE-ID).
        band: a hypothesis on the clips among the choices.
        choices: each choice's effect on the slowest periods.
        warnings: sentences.
    """

    position: Position
    start: RopeChain
    train_length: int
    target_length: int
    critical_dimension: int
    beyond: tuple[UnfinishedPairs, ...]
    clip: int | None
    clip_at: UnfinishedPairs
    yarn_from: int
    yarn_factor: float
    yarn_ramp: tuple[float, float] | None
    band: LearnedBand
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
    """Advice for a model: the clip, YaRN's factor and ramp, the effect of each choice, warnings.

    Args:
        position: of the model; Position.from_pretrained reads it off a config.json.
        theta: base the run would change to; None: the model's own chain stays.
        train_length: tokens the run would train at; None: no training, the model's trained length.
        target_length: tokens to serve; None: four times the training length.
        chain: a chain to judge beside the advisor's own choices; it follows the run's start, or replaces it where it
            lays the spectrum out anew.
        config: config.json's content, for warnings about its keys.

    Raises:
        UserError: for a length or base out of range, or a chain that does not fit.
    """
    if theta is not None and not theta > 1:
        raise UserError(
            f"theta={theta:g} must be above 1; leave it out to keep the model's own base, "
            f"{print_value(position.spectrum().theta)}, or name the one to change to, such as 1e7"
        )
    position = replace(
        position, chain=position.chain.frequencies()
    )  # all counts here are of text, in layers that rotate
    trained = position.trained_length if train_length is None else train_length
    target = 4 * trained if target_length is None else target_length
    _check_lengths(trained, target)
    start = position.chain if theta is None else RopeChain([{"method": "abf", "theta": theta}])
    # words of a chain resolve as they would in that training
    pretrained_length = position.pretrained_length if train_length is None else position.trained_length
    run = replace(position, chain=start, pretrained_length=pretrained_length, trained_length=trained)
    base = run.spectrum()
    clip = recommended_clip(base) if clip_of(start) is None and base.inv_freq.all() else None
    yarn_from = max(trained, reached_length(run.chain.steps, base) or 0)
    clips = _clips(run, clip)
    yarns = _yarns(run, clips[-1:], yarn_from, target)
    own = [] if chain is None else [replace(run, chain=chain.after(run.chain))]
    arms = [*((arm, arm) for arm in (run, *clips)), *yarns, *((arm, arm) for arm in own)]
    if train_length is None:  # no training: the model was trained with its present spectrum
        arms = [(position, served) for _, served in arms]
    warned = [run, *clips, *(served for _, served in yarns if target_length is not None), *own]
    pretrained = replace(position, chain=RopeChain([]))
    at_pretrained = [UnfinishedPairs.of(model, position.pretrained_length) for model in (pretrained, position, run)]
    clip_at = UnfinishedPairs.of(run, trained)
    return Advice(
        position=position,
        start=start,
        train_length=trained,
        target_length=target,
        critical_dimension=critical_dimension(position.head_dim, position.theta, position.pretrained_length),
        beyond=tuple(dict.fromkeys([*at_pretrained, clip_at])),
        clip=clip,
        clip_at=clip_at,
        yarn_from=yarn_from,
        yarn_factor=target / yarn_from,
        yarn_ramp=yarn_ramp_ends(base, yarn_from) if base.rotary_dim else None,
        band=LearnedBand.of([run, *clips, *own]),
        choices=tuple(_choice(start, trained_as, served, target) for trained_as, served in arms),
        warnings=tuple(warnings(run, warned, yarn_from, config or {})),
    )


def _check_lengths(train_length: int, target_length: int) -> None:
    for name, length in (("train_length", train_length), ("target_length", target_length)):
        if length < SHORTEST:
            raise UserError(
                f"{name}={length} must be {SHORTEST} tokens or more, within which the fastest pair finishes its first "
                "turn; name a length such as 65536, or leave it out for the model's own"
            )
    if target_length < train_length:
        raise UserError(
            f"target_length={target_length} is below train_length={train_length}; name the length to serve, at least "
            "that"
        )


def _clips(run: Position, clip: int | None) -> list[Position]:
    """The recommended clip, hard and soft; empty without a recommendation."""
    return [run.extended([{"method": name, "clip": clip}]) for name in ("hardclip", "cope") if clip]


def _yarns(run: Position, cope: list[Position], length: int, target_length: int) -> list[tuple[Position, Position]]:
    """YaRN, or RoPE-ID's own form, at test time, as trained and as served: over the start, and over the soft clip."""
    if target_length <= length:
        return []
    method = "yarn" if run.spectrum().rotary_dim else "rope_id_yarn"
    yarn = {"method": method, "factor": target_length / length, "original_max_position_embeddings": length}
    return [(arm, arm.extended([yarn])) for arm in (run, *cope)]


def _choice(start: RopeChain, trained: Position, served: Position, target_length: int) -> Choice:
    follows = served.chain.steps[: len(start.steps)] == start.steps
    added = served.chain.steps[len(start.steps) :] if follows else served.chain.steps
    at_training, at_target = trained.spectrum(), served.spectrum(length=target_length)
    turning = at_target.inv_freq[at_target.inv_freq > 0]
    covered = np.minimum(at_training.turns(trained.trained_length), 1.0)
    reached = np.minimum(at_target.turns(target_length), 1.0)
    return Choice(
        chain=" > ".join(map(str, added)) or "as it is",
        stopped=int((at_target.inv_freq == 0).sum()),
        slowest_period=float(2 * np.pi / turning.min()) if turning.size else math.inf,
        unfinished=int(((at_training.inv_freq > 0) & (at_training.turns(trained.trained_length) < 1)).sum()),
        new_phases=int((reached > covered * (1 + 1e-9)).sum()),
        new_turns=float(np.maximum(reached - covered, 0.0).sum()),
    )


def warnings(run: Position, choices: Sequence[Position], yarn_from: int, config: Mapping[str, Any]) -> Iterator[str]:
    """Warnings, as sentences.

    Args:
        run: the start of a run.
        choices: recommended for it, or named by a user.
        yarn_from: tokens that YaRN would stretch.
        config: config.json's content, empty where there is none.
    """
    yield from _clipped_already(run)
    yield from chain_warnings(choices)
    if scalings := [str(step) for step in run.chain.steps if get_method(step.method).scaling]:
        yield (
            f"the model is scaled already ({' > '.join(scalings)}): a second scaling must start from the "
            f"length that the first one reached, or a longer one, so YaRN would stretch {yarn_from:,} tokens here; "
            "start from abf to scale once"
        )
    yield from _layers_that_differ(config)
    yield from _windows(config)
    yield from config_warnings(config)


def chain_warnings(choices: Sequence[Position]) -> Iterator[str]:
    """Warnings about chains by themselves, which training logs too: clips, scalings, layers without rotation."""
    pairs = choices[0].head_dim // 2
    largest = max((int(step.arguments["clip"]) for choice in choices if (step := clip_of(choice.chain))), default=0)
    if largest > LARGEST_CLIP * pairs:
        yield (
            f"a clip of {largest} is above 75% of all {pairs} pairs, so little is left to tell positions apart; raise "
            "theta or the training length, or clip less"
        )
    if any(not choice.spectrum().inv_freq.any() for choice in choices):
        yield (
            "no pair rotates: without rotation only the causal mask tells positions apart. DroPE (arXiv 2512.12167) "
            "trains with rotation first, drops it, and recalibrates at the length that the model had "
            "(recipes/drope_demo)"
        )
    if any(learned_step(choice.chain) is not None for choice in choices):
        yield (
            "the run trains its frequencies: all counts here are of those it begins with. LeRoPE (arXiv 2607.10134) "
            "trained them from scratch, where such a model alone went on worse past its length than RoPE, and better "
            "under YaRN; of a model that is continued so nothing is published"
        )
    if any(step.arguments.get("alpha") for choice in choices for step in choice.chain.steps):
        yield (
            "learned frequencies, frozen: they were trained with one model's weights. A model that was trained anew "
            "with LeRoPE's kept 63.6% of what they gained (arXiv 2607.10134, table 2)"
        )
    if any(choice.layers is not None for choice in choices):
        yield (
            "layers without rotation: all counts are of the layers that rotate. A model that was trained with "
            "rotation everywhere is another model until it is trained for it. vLLM runs it by transformers' own code, "
            "SGLang has no class for it, and llama.cpp knows every fourth layer alone, under plain RoPE, linear or yarn"
        )
    for choice in choices:
        if (own := choice.temperature) is not None and own.beta and choice.trained_length <= own.length:
            yield (
                f"no query is scaled before position {own.length:,}, and training at {choice.trained_length:,} tokens "
                "reaches none past it: what the temperature does there is not trained; give log_temperature a shorter "
                "length"
            )
            break
    if any(choice.temperature is not None for choice in choices):
        yield (
            "a temperature by position beside the frequencies: no count here has it. transformers 5, vLLM and "
            "llama.cpp compute it; SGLang's class looks for its length elsewhere. Documents count positions from their "
            "own start"
        )
    if any(_clip_under(choice.chain, "llama3") for choice in choices):
        yield (
            "a clip under llama3 scaling: llama3 scales by wavelength and the clip by index, so their order matters "
            "and no published run has both; start from abf, which replaces the scaling, or test both orders"
        )
    if any(_clip_under(choice.chain, "yarn") for choice in choices):
        yield (
            "a clip under full YaRN: YaRN interpolates the pairs that the clip has slowed already and adds its "
            "attention scaling; evaluate the clipped model with and without it (test_time=none)"
        )


def _clipped_already(run: Position) -> Iterator[str]:
    own = clip_of(run.chain)
    fix = (
        f"to choose another, start from abf (theta={print_value(run.spectrum().theta)} keeps the base), which lays "
        "the spectrum out anew"
    )
    if own is not None:
        yield f"the model is clipped already ({own}) and a chain clips once, so no clip is recommended; {fix}"
    elif stopped := int((run.spectrum().inv_freq == 0).sum()):
        yield (
            f"{stopped} pairs are stopped already ({run.chain}): a clip would count from the slowest that rotates, and "
            f"no published run has both, so none is recommended; {fix}"
        )


def config_warnings(config: Mapping[str, Any]) -> Iterator[str]:
    """Warnings about a config.json that can be read two ways, or says more than stock transformers reads."""
    if not config:
        return
    text = config.get("text_config") or config
    if "dual_chunk_attention_config" in text:
        chunks = text["dual_chunk_attention_config"]
        named = chunks.get("original_max_position_embeddings") if isinstance(chunks, Mapping) else None
        served, length = (f"{n:,}" if isinstance(n, int) else n for n in (text.get("max_position_embeddings"), named))
        yield (
            "dual_chunk_attention_config: stock transformers ignores it and attends without the chunks, so "
            f"max_position_embeddings={served} is no length that it was trained at; the "
            f"file names {f'{length} tokens' if length else 'none'} as that"
        )
    if config.get(METADATA_KEY):
        return
    stock = read_hf_position(config)
    kind = stock.entry.get("rope_type") or stock.entry.get("type")
    older = stock.entry.get("type")
    if older is not None and older != kind:
        yield (
            f"type={older!r} beside rope_type={kind!r}: transformers takes rope_type, as here, and vLLM refuses the "
            "file; delete the one that is not the model's"
        )
    starts = ("original_max_position_embeddings", "max_sequence_length")
    named_start = any(values.get(key) is not None for values in (stock.entry, text) for key in starts)
    if kind == "linear" and not named_start:
        factor, served = float(stock.entry["factor"]), stock.trained_length
        yield (
            f"linear scaling by {factor:g} is read in the convention of Gemma 3, from {served / factor:,.0f} tokens to "
            f"max_position_embeddings={served:,}; in that of Vicuna-16k and LongChat it is from {served:,} to "
            f"{served * factor:,.0f}, and the file does not say which: write original_max_position_embeddings into it"
        )
    share = next((values[SHARE] for values in (stock.entry, text) if values.get(SHARE) is not None), 1)
    if kind in (None, "default") and share != 1 and text.get("model_type") not in READ_SHARE:
        yield (
            f"{SHARE}={share}: transformers' {text.get('model_type')} does not read it and rotates whole heads, as is "
            "counted here; other engines rotate the share alone: delete it where whole heads were trained"
        )
    if "mrope_section" in stock.entry and not any(step["method"] == "axes" for step in stock.chain):
        yield (
            f"mrope_section={stock.entry['mrope_section']} of model_type={text.get('model_type')} is not read: all "
            "that is said here is of text, whose positions are equal on all axes"
        )
    named = any("original_max_position_embeddings" in values for values in (stock.entry, text))
    if kind in STRETCHED and not named:
        yield (
            f"rope_type={kind} without original_max_position_embeddings: transformers takes max_position_embeddings="
            f"{stock.trained_length:,} in its place without a warning; write the length the model was trained at"
        )
    present = [key for key in REFERENCE_KEYS if key in config]
    if present:
        yield (
            f"{' and '.join(f'{key}={config[key]}' for key in present)}: CoPE's published code reads these; stock "
            "engines ignore them and rotate without the clip. Export the model through a chain with cope(clip=...)"
        )


def _layers_that_differ(config: Mapping[str, Any]) -> Iterator[str]:
    """Gemma 3 and OLMo 3, in transformers 5's form (rope_parameters for each layer type) or the older one."""
    text = config.get("text_config") or config
    entry = text.get("rope_parameters") or {}
    others = [f"{kind} layers" for kind in entry if kind != "full_attention" and isinstance(entry[kind], Mapping)]
    is_layered = "full_attention" in entry and bool(others)
    if is_layered or _is_layered(text):
        yield (
            "layers differ: only the full_attention layers take a chain, and all counts here are theirs; "
            f"{' and '.join(others) or 'sliding_attention layers'} keep the rotation that the config gives them, in "
            "training and in what is exported"
        )


def _windows(config: Mapping[str, Any]) -> Iterator[str]:
    """Windows under the one rotation of all layers, and models that are advised on and not trained."""
    text = config.get("text_config") or config
    window, types = text.get("sliding_window"), text.get("layer_types") or []
    is_windowed = window and text.get("use_sliding_window", True) and (not types or "sliding_attention" in types)
    if is_windowed and "full_attention" not in (text.get("rope_parameters") or {}) and not _is_layered(text):
        named = f"{types.count('sliding_attention')} of {len(types)} layers" if types else "layers with a window"
        yield (
            f"sliding_window={window}: {named} see no distance beyond it, and the config has one entry for all, so a "
            "chain for longer distances changes these layers, too"
        )
    if reason := UNTRAINED.get(str(config.get("model_type"))):
        yield f"model_type={config['model_type']} is advised on and not trained here: it has {reason}"


def _is_layered(text: Mapping[str, Any]) -> bool:
    """True for a config in the older form of a model whose layer types rotate differently."""
    return "rope_local_base_freq" in text or str(text.get("model_type")).startswith("olmo3")


def _clip_under(chain: RopeChain, scaling: str) -> bool:
    return clip_of(chain) is not None and any(step.method == scaling for step in chain.steps)
