"""``python scripts/analyze.py advise``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ropewalk.analysis.subjects import is_declared, locate, read_chains, read_model
from ropewalk.config.analysis import AdviseConfig
from ropewalk.rope import Position
from ropewalk.rope.advisor import BAND, Advice, Choice, LearnedBand, advise
from ropewalk.rope.chain import clip_of, in_words, print_value
from ropewalk.rope.hf_config import read_config_json


def print_advice(config: AdviseConfig) -> Advice:
    """Print what the advisor says of ``config.model.path``, and return it.

    Raises:
        UserError: for a model that cannot be read, or a length or chain that does not fit it.
    """
    chain = None if config.chain is None else next(iter(read_chains([config.chain]).values()))
    position = read_model(config.model.path)
    advice = advise(
        position,
        theta=config.theta,
        train_length=config.train_length,
        target_length=config.target_length,
        chain=chain,
        config=None if is_declared(config.model.path) else read_config_json(locate(config.model.path)),
    )
    print(describe(advice, position), flush=True)
    return advice


def describe(advice: Advice, model: Position | None = None) -> str:
    """The findings as a page of text.

    Args:
        advice: of the advisor, which counts frequencies alone.
        model: what it was asked about, for the axes, layers and temperature that stand beside its frequencies.
    """
    position, beside = advice.position, model or advice.position
    axes, layers, temperature = beside.axes, beside.layers, beside.temperature
    base = print_value(position.theta)
    findings = [
        (
            "model",
            f"{in_words(position.chain)}, pretrained at base {base} and {position.pretrained_length:,} tokens, trained "
            f"at {position.trained_length:,} tokens; {position.head_dim // 2} pairs",
        ),
        *([] if axes is None else [("axes", f"{axes}; all numbers below are of text, whose three positions are one")]),
        *([] if layers is None else [("layers", f"{layers}; all numbers below are of the others")]),
        *([] if temperature is None else [("temperature", f"{temperature}; no number below has it")]),
        (
            "critical dimension",
            f"{advice.critical_dimension} of {position.head_dim} channels, at base {base} and "
            f"{position.pretrained_length:,} tokens",
        ),
        *(("" if number else "never finish a turn", str(beyond)) for number, beyond in enumerate(advice.beyond)),
        ("recommended clip", _clip(advice)),
        ("YaRN", _yarn(advice)),
        *(("" if number else "hypothesis", line) for number, line in enumerate(_band(advice.band))),
    ]
    lines = [f"{name:<22}{text}" for name, text in findings]
    base = print_value(advice.clip_at.theta)
    lines += ["", f"from {in_words(advice.start)} (base {base}):", *_table(advice.choices)]
    lines += [
        "stopped: pairs without rotation. slowest period: tokens in a turn. unfinished: rotating pairs that never",
        f"finish a turn in {advice.train_length:,} tokens. new phases: pairs that reach phases at "
        f"{advice.target_length:,} tokens",
        f"which training at {advice.train_length:,} never did, and how far in sum.",
    ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in advice.warnings)])


def _clip(advice: Advice) -> str:
    if advice.clip is None:
        own = clip_of(advice.start)
        return f"none: {f'the model is clipped already, by {own}' if own else 'pairs are stopped already'}"
    if advice.clip == 0:
        return f"none: 75% of {advice.clip_at}, rounded down, is no pair"
    return f"{advice.clip}: 75% of {advice.clip_at}, rounded down{_rounding(advice.clip_at.pairs)}"


def _rounding(pairs: int) -> str:
    """The nearest whole number, where it is another: CoPE's one example, 20 of 27, has both alike."""
    down, nearest = 3 * pairs // 4, (3 * pairs + 2) // 4
    return "" if nearest == down else f"; rounding decides: {0.75 * pairs:g} is {nearest} to the nearest pair"


def _band(band: LearnedBand) -> Iterator[str]:
    source = f"learned spectra keep a band near {BAND:g} training lengths (LeRoPE, arXiv 2607.10134)"
    if band.pair is None:
        yield f"{source}: {band.period:,.0f} tokens, and the slowest pair turns once in {band.pair_period:,.0f}"
        return
    yield f"{source}: pair {band.pair}, {band.pair_period:,.0f} tokens a turn"
    words = {0.0: "stops it", 1.0: "keeps it"}
    if clips := [f"{clip} {words.get(weight, f'slows it to {weight:.0%}')}" for clip, weight in band.weights]:
        yield ", ".join(clips)


def _yarn(advice: Advice) -> str:
    if advice.yarn_factor <= 1:
        return (
            f"none: the target, {advice.target_length:,} tokens, is not beyond the {advice.yarn_from:,} it starts from"
        )
    if advice.yarn_ramp is None:
        return f"rope_id_yarn, factor {advice.yarn_factor:g} from {advice.yarn_from:,} tokens: the slowest pair in full"
    (low, high), last = advice.yarn_ramp, advice.position.head_dim // 2 - 1
    kept = f"pairs 0 to {min(low, last):g} are kept" if low else "pair 0 is kept"
    divided = f"pairs {high:g} to {last} divided by {advice.yarn_factor:g}" if high <= last else "none divided in full"
    return f"factor {advice.yarn_factor:g} from {advice.yarn_from:,} tokens: {kept}, {divided}"


def _table(choices: Sequence[Choice]) -> list[str]:
    heads = ("stopped", "slowest period", "unfinished", "new phases", "in turns")
    width = max(len(choice.chain) for choice in choices)
    rows = [f"{'chain':<{width}}  {'  '.join(f'{head:>14}' for head in heads)}"]
    for c in choices:
        cells = (f"{c.stopped}", f"{c.slowest_period:,.0f}", f"{c.unfinished}", f"{c.new_phases}", f"{c.new_turns:.2f}")
        rows.append(f"{c.chain:<{width}}  {'  '.join(f'{cell:>14}' for cell in cells)}")
    return rows
