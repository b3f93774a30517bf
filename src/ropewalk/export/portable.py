"""The position entry of an exported config.json, in the forms that every reader of it looks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ropewalk.files import write_atomically
from ropewalk.model.load import write_config
from ropewalk.model.rotary import place_position, rope_entry
from ropewalk.rope.chain import Steps, check_trained
from ropewalk.rope.position import METADATA_KEY, Position

OLDER = ("rope_theta", "rope_scaling")  # where transformers before 5 looks


def place_portable(
    config: PreTrainedConfig, position: Position, served: int, extra: Steps = (), length: int | None = None
) -> PreTrainedConfig:
    """Put ``position`` into a config, for ``served`` tokens, in a form that every version reads alike.

    Readers differ on two stock types, whose spectra are written as longrope factors instead. Of ``yarn`` transformers
    4.45 to 4.52 read other lengths, and vLLM and SGLang end their tables at factor x original length (docs/serving.md;
    benchmarks/transformers4.py shows the first); ``proportional`` transformers 4 does not know.

    Returns the config, which :func:`ropewalk.model.rotary.place_position` may have made anew.

    Args:
        config: of the model.
        position: how the checkpoint rotates; its metadata is put into the config as well.
        served: tokens.
        extra: steps after its chain, of which the metadata says nothing.
        length: tokens of the inputs, for length-dependent methods; None: the trained length.
    """
    check_trained(position.chain)
    config.get_text_config().max_position_embeddings = served
    config = place_position(config, position.extended(extra), length, refused=("yarn", "proportional"))
    setattr(config, METADATA_KEY, position.metadata())
    return config


def older_form(config: PreTrainedConfig) -> dict[str, Any]:
    """The same position as keys of the (text) config in the form of transformers 4.

    Without them version 4 takes base 10,000 and no scaling, silently. Gemma 3's key for the base of the layers with a
    window is written too; OLMo 3 has none (see :func:`ropewalk.model.rotary.place_position`).
    """
    entry = rope_entry(config)
    form: dict[str, Any] = {"rope_theta": entry["rope_theta"]}
    if entry["rope_type"] != "default" or "mrope_section" in entry:
        form["rope_scaling"] = {k: v for k, v in entry.items() if k != "partial_rotary_factor"}
    if "partial_rotary_factor" in entry:
        form["partial_rotary_factor"] = entry["partial_rotary_factor"]
    text = config.get_text_config()
    local = text.rope_parameters.get("sliding_attention")
    if isinstance(local, Mapping) and text.model_type.startswith("gemma3"):
        form["rope_local_base_freq"] = local["rope_theta"]
    return form


def write_portable_config(config: PreTrainedConfig, directory: Path) -> bool:
    """Write config.json with both forms; returns whether the older one is in it.

    It is left out where this transformers would then read another position than without it.
    """
    path = directory / "config.json"
    write_config(config, path)
    content = json.loads(path.read_text(encoding="utf-8"))
    intended = _rope_parameters(directory)
    both = text_part(content) | older_form(config)
    write_atomically(path, _text({**content, "text_config": both} if "text_config" in content else both))
    if _rope_parameters(directory) == intended:
        return True
    write_atomically(path, _text(content))
    return False


def text_part(content: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that is about the language model: of a model of images and videos its own config."""
    return dict(content.get("text_config") or content)


def _rope_parameters(directory: Path) -> Any:
    return AutoConfig.from_pretrained(directory).get_text_config().rope_parameters


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
