"""Warnings about a chain, and about keys of a config.json that stock code reads otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ropewalk.rope.chain import RopeChain, clip_of
from ropewalk.rope.hf_config import REFERENCE_KEYS, read_hf_position
from ropewalk.rope.notation import print_value
from ropewalk.rope.position import METADATA_KEY, Position
from ropewalk.rope.registry import get_method

LARGEST_CLIP = 0.75  # of all pairs
NEEDS_ORIGINAL = ("yarn", "llama3", "longrope", "su")


def warnings(run: Position, choices: Sequence[Position], yarn_from: int, config: Mapping[str, Any]) -> Iterator[str]:
    """Warnings, as sentences.

    Args:
        run: the start of a run.
        choices: recommended for it, or named by a user.
        yarn_from: tokens that YaRN would stretch.
        config: config.json's content, empty where there is none.
    """
    yield from _clipped_already(run)
    pairs = run.head_dim // 2
    largest = max((int(step.arguments["clip"]) for choice in choices if (step := clip_of(choice.chain))), default=0)
    if largest > LARGEST_CLIP * pairs:
        yield (
            f"a clip of {largest} is above 75% of all {pairs} pairs, so little is left to tell positions apart; raise "
            "theta or the training length, or clip less"
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
    if scalings := [str(step) for step in run.chain.steps if get_method(step.method).scaling]:
        yield (
            f"the model is scaled already ({' > '.join(scalings)}): a second scaling must start from the "
            f"length that the first one reached, or a longer one, so YaRN would stretch {yarn_from:,} tokens here; "
            "start from abf to scale once"
        )
    yield from _of_config(config)


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


def _of_config(config: Mapping[str, Any]) -> Iterator[str]:
    if not config:
        return
    yield from _layers_that_differ(config)
    if config.get(METADATA_KEY):
        return
    stock = read_hf_position(config)
    kind = stock.entry.get("rope_type") or stock.entry.get("type")
    text = config.get("text_config") or config
    named = any("original_max_position_embeddings" in values for values in (stock.entry, text))
    if kind in NEEDS_ORIGINAL and not named:
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
    if is_layered or "rope_local_base_freq" in text or str(text.get("model_type")).startswith("olmo3"):
        yield (
            "layers differ: only the full_attention layers take a chain, and all counts here are theirs; "
            f"{' and '.join(others) or 'sliding_attention layers'} keep the rotation that the config gives them"
        )


def _clip_under(chain: RopeChain, scaling: str) -> bool:
    return clip_of(chain) is not None and any(step.method == scaling for step in chain.steps)
