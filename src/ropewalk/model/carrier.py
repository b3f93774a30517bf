"""Configs of stock classes that hold a Llama's weights and carry what stands beside its frequencies."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ropewalk.errors import UserError
from ropewalk.rope import log_temperature
from ropewalk.rope.log_temperature import LogTemperature
from ropewalk.rope.nope_layers import CARRIED, CARRIER, LACKING, NopeLayers


def carry_layers(config: PreTrainedConfig, layers: NopeLayers) -> PreTrainedConfig:
    """The config of stock SmolLM3ForCausalLM, which reads the weights of a Llama under their names, with ``layers``.

    Raises:
        UserError: for a model that has something which that class lacks, or too few layers.
    """
    kind, window = config.model_type, getattr(config, "sliding_window", None)
    if kind not in CARRIED:
        raise _not_carried(config, "leave layers without rotation", "SmolLM3ForCausalLM", CARRIED, "nope_layers")
    if kind != CARRIER and window:
        raise UserError(
            f"sliding_window={window}: SmolLM3ForCausalLM, which carries nope_layers, would attend to everything; set "
            "sliding_window to null in the model's config (model.drop=[sliding_window] in training)"
        )
    config = _in_class(config, CARRIER, "SmolLM3ForCausalLM")
    for key, value in layers.stock_keys(config.num_hidden_layers).items():
        setattr(config, key, value)
    return config


def carry_temperature(config: PreTrainedConfig, temperature: LogTemperature) -> PreTrainedConfig:
    """The config of stock Ministral3ForCausalLM, which reads the weights of a Llama under their names.

    ``temperature`` is in its rope_parameters, and here beside them once more, for vLLM.

    Raises:
        UserError: for a model that has something which that class lacks.
    """
    architecture, carried = "Ministral3ForCausalLM", log_temperature.CARRIED
    if config.model_type not in carried:
        raise _not_carried(config, "scale queries by their position", architecture, carried, "log_temperature")
    if biases := [key for key in ("attention_bias", "mlp_bias") if getattr(config, key, False)]:
        raise UserError(
            f"{biases[0]}=True: {architecture}, which carries log_temperature, has no biases; use a base without them, "
            "or a chain without log_temperature"
        )
    config = _in_class(config, log_temperature.CARRIER, architecture)
    setattr(config, log_temperature.VLLM_KEY, temperature.vllm_keys())
    return config


def _not_carried(config: PreTrainedConfig, act: str, architecture: str, carried: Sequence[str], step: str) -> UserError:
    return UserError(
        f"model_type={config.model_type} cannot {act}: the stock class that can, {architecture}, is a Llama's and has "
        f"not {LACKING.get(config.model_type, 'its layers')}; use a base of type {', '.join(carried)}, or a chain "
        f"without {step}"
    )


def _in_class(config: PreTrainedConfig, carrier: str, architecture: str) -> PreTrainedConfig:
    if config.model_type == carrier:
        return config
    name, content = config.name_or_path, config.to_dict()
    config = CONFIG_MAPPING[carrier].from_dict({**content, "model_type": carrier})
    config.name_or_path, config.architectures = name, [architecture]
    return config
