"""Whether the weights of a Hugging Face directory are those that its config speaks of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from ropewalk.export.safetensors_files import StoredWeights


def weight_faults(directory: Path, config: PreTrainedConfig) -> Iterator[str]:
    """What is missing or has another shape, in words; only headers are read.

    A model whose weights transformers renames when it loads them (experts kept one by one) is not looked at.
    """
    try:
        shapes = StoredWeights(directory).shapes()
    except ValueError as error:
        yield str(error)
        return
    if get_checkpoint_conversion_mapping(config.model_type) is not None:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    missing = sorted(set(wanted) - set(shapes))
    other = sorted(name for name in set(wanted) & set(shapes) if wanted[name] != shapes[name])
    if missing:
        yield f"{len(missing)} weights are missing, {missing[0]} first"
    if other:
        yield f"{len(other)} weights have other shapes, {other[0]} first"
