"""Models of stock transformers, built or loaded with their spectrum, which is asserted."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging

from ropewalk.config.groups import RopeConfig
from ropewalk.config.train import SUPPORTED_MODEL_TYPES, VISION_MODEL_TYPES, ModelConfig
from ropewalk.errors import UserError
from ropewalk.model import attention
from ropewalk.model.hf_directory import auto_class, check_causal, load_whole, read_config
from ropewalk.model.rotary import assert_spectrum, install_spectrum, place_position
from ropewalk.model.vision import has_vision
from ropewalk.rope.advisor import UNTRAINED
from ropewalk.rope.chain import RopeChain, Steps, learned_step
from ropewalk.rope.log_temperature import LENGTH
from ropewalk.rope.position import METADATA_KEY, POSITION_KEYS, Position, declared_position, position_of

if sys.stderr is None or not sys.stderr.isatty():
    transformers_logging.disable_progress_bar()  # not in a log file


def _is_of_no_key_that_is_read(record: logging.LogRecord) -> bool:
    # transformers warns of the two keys of a longrope entry that vLLM and SGLang need, and of a temperature's length
    return "short_mscale" not in record.getMessage() and f": {{'{LENGTH}'}}" not in record.getMessage()


logging.getLogger("transformers.modeling_rope_utils").addFilter(_is_of_no_key_that_is_read)


def read_position(directory: str | Path) -> Position:
    """How the checkpoint in a Hugging Face directory rotates."""
    return position_of(read_config(directory))


def training_config(
    model: ModelConfig, rope: RopeConfig, sequence_length: int, start: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """The transformers config of a training run: architecture, compiled chain, metadata.

    The run's chain follows the checkpoint's own, or replaces it where it lays the spectrum out anew (abf, rope_id).

    Args:
        model: the model group.
        rope: the run's chain.
        sequence_length: tokens.
        start: config.json of the training checkpoint that the run starts from; it replaces ``model.path``, and its
            trained length replaces ``model.pretrained_length``.

    Raises:
        UserError: for an unsupported architecture, or a declared theta, head_dim or pretrained length that the
            checkpoint contradicts.
    """
    if start is not None:
        config = type(AutoConfig.for_model(start["model_type"])).from_dict(deepcopy(dict(start)))
    elif model.path is None:
        architecture = deepcopy(dict(model.architecture))  # transformers writes into nested entries
        _declared(model)  # refuses what contradicts
        architecture |= {"rope_theta": model.theta, "max_position_embeddings": model.pretrained_length}
        config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    else:
        config = read_config(model.path, key="model.path", revision=model.revision)
        check_causal(config, also=VISION_MODEL_TYPES)
        _check_sizes(model, config)
    _drop(config, model.drop)
    _check_architecture(config)
    origin = position_of(config)
    _check_declared(model if start is None else replace(model, pretrained_length=origin.trained_length), origin)
    position = origin.continued(
        origin.name if start is not None and not rope.chain else rope.name,
        RopeChain.of(rope),
        sequence_length,
        base_model=model.path if start is None else origin.base_model,
    )
    config.get_text_config().max_position_embeddings = sequence_length
    config = place_position(config, position)
    layered = any(isinstance(entry, Mapping) for entry in config.get_text_config().rope_parameters.values())
    more = position.axes or ("one for each layer type" if layered else "")
    if more and (step := learned_step(position.chain)) is not None:
        raise UserError(
            f"{step} trains the one table of a text model, and model_type={config.model_type} has {more}; choose a "
            "chain without it"
        )
    setattr(config, METADATA_KEY, position.metadata())
    config.get_text_config().use_cache = False
    return config


def _check_architecture(config: PreTrainedConfig) -> None:
    known = (*SUPPORTED_MODEL_TYPES, *VISION_MODEL_TYPES)
    if reason := UNTRAINED.get(config.model_type):
        raise UserError(
            f"model_type={config.model_type!r} is not trained: it has {reason}; analyze.py advise and inspect read it, "
            f"and this trainer knows: {', '.join(known)}"
        )
    if config.model_type not in known:
        raise UserError(f"model_type={config.model_type!r} is not supported; this trainer knows: {', '.join(known)}")
    text = config.get_text_config()
    if dropout := getattr(text, "attention_dropout", None):
        raise UserError(
            f"the model has attention_dropout={dropout}, and training attends without dropout; set "
            "model.drop=[attention_dropout] to train and export it without, and know that it was not trained that way "
            "before"
        )
    lacking = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")  # of Gemma 3's class
    if unknown := [name for name in lacking if getattr(text, name, None)]:
        raise UserError(
            f"the model has {unknown[0]}={getattr(text, unknown[0])}, which no kernel or loss here computes; Gemma 3's "
            "own models have none: use one of those"
        )


def _drop(config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Leave fields of DROPPED_FIELDS out of a model's config."""
    config = config.get_text_config()
    if "attention_dropout" in names:
        config.attention_dropout = 0.0
    if "sliding_window" in names:
        if "rope_type" not in config.rope_parameters:
            raise UserError(
                f"model.drop=[sliding_window]: the windowed layers of {config.model_type} rotate by an entry of their "
                "own, which means nothing beyond the window; leave it out: it trains with its windows"
            )
        config.sliding_window = None
        if hasattr(config, "use_sliding_window"):
            config.use_sliding_window = False
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"] * config.num_hidden_layers


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens that the model's windowed layers attend to; None: every layer attends to all."""
    config = config.get_text_config()  # of a model of images and videos too
    window = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """The window of each layer, tokens; None: it attends to all."""
    text, window = config.get_text_config(), sliding_window(config)
    types = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]


def head_dim(config: PreTrainedConfig) -> int:
    """Channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes(config: PreTrainedConfig, tokens: int, bytes_each: int = 2) -> int:
    """Memory of one sequence's keys and values: 2 x layers x key/value heads x head_dim x bytes a token.

    A layer with a sliding window keeps no more tokens than its window.

    Args:
        config: of the model.
        tokens: length of the sequence.
        bytes_each: of one number; 2 for bf16.
    """
    window, config = sliding_window(config), config.get_text_config()
    layers = config.num_hidden_layers
    windowed = (getattr(config, "layer_types", None) or ["sliding_attention"] * layers).count("sliding_attention")
    kept = layers * tokens if window is None else windowed * min(window, tokens) + (layers - windowed) * tokens
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * kv_heads * head_dim(config) * bytes_each * kept


def _declared(model: ModelConfig) -> Position:
    return declared_position(model.theta, model.head_dim, model.pretrained_length, model.architecture)


def _check_sizes(model: ModelConfig, config: PreTrainedConfig) -> None:
    """A checkpoint's architecture may be declared, for the planner; it must then be the checkpoint's."""
    if POSITION_KEYS & model.architecture.keys():
        chain, own = _declared(model).chain, position_of(config).chain
        if chain != own:
            raise UserError(
                f"model.architecture declares {chain}, but the checkpoint {model.path} has {own}; write its "
                "rope_scaling there as its config.json has it"
            )
    for name, declared in model.architecture.items():
        if name in POSITION_KEYS:
            continue
        actual = getattr(config, name, getattr(config.get_text_config(), name, None))
        if isinstance(actual, PreTrainedConfig) and isinstance(declared, Mapping):
            actual = {field: getattr(actual, field, None) for field in declared}
        if declared != actual:
            raise UserError(
                f"model.architecture.{name}={declared}, but the checkpoint {model.path} has {actual}; set "
                f"model.architecture.{name}={actual}"
            )


def _check_declared(model: ModelConfig, origin: Position) -> None:
    actual = {"theta": origin.theta, "head_dim": origin.head_dim, "pretrained_length": origin.trained_length}
    for name, value in actual.items():
        declared = getattr(model, name)
        if declared != value:
            raise UserError(
                f"model.{name}={declared}, but the checkpoint {model.path or 'architecture'} has {value}; "
                f"set model.{name}={value}" + (", its max_position_embeddings" if name == "pretrained_length" else "")
            )


def build_for_training(
    config: PreTrainedConfig,
    path: str | None,
    dtype: torch.dtype,
    revision: str | None = None,
    attention_choice: str = "auto",
) -> PreTrainedModel:
    """The model with document-masked attention; ``path`` None: random weights, the same under every ZeRO stage.

    Under a live HfDeepSpeedConfig of stage 3 the parameters come out partitioned.

    Raises:
        UserError: where weights are missing at ``path``, or have other shapes than in its config.
    """
    name = attention.register(attention_choice)
    # documents are the language model's; a tower attends inside its frames
    implementation = {"text_config": name, "vision_config": "sdpa"} if has_vision(config) else name
    if path is None:
        # Under ZeRO-3 transformers builds the modules without their own random weights, and then draws the model's.
        is_partitioned = is_deepspeed_zero3_enabled()
        with nullcontext() if is_partitioned else no_init_weights():
            model = auto_class(config).from_config(config, dtype=dtype, attn_implementation=implementation)
        if not is_partitioned:
            model.initialize_weights()
            model.tie_weights()
    else:
        model = load_whole(path, revision=revision, config=config, dtype=dtype, attn_implementation=implementation)
    model.config.architectures = [type(model).__name__]  # what vLLM and SGLang choose the class by
    return model


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a model with this config, tied ones once; no memory is taken for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in auto_class(config).from_config(config).parameters())


def exact_products() -> None:
    """Undo an image's settings that round matrix products on a GPU: TF32 for fp32, bf16 sums of split bf16 ones."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def load_for_evaluation(
    directory: str | Path,
    extra: Steps = (),
    *,
    length: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> PreTrainedModel:
    """A checkpoint in stock transformers with stock attention, ``extra`` steps appended to its chain.

    Args:
        directory: Hugging Face directory.
        extra: test-time methods, as in a chain.
        length: tokens of the inputs, for length-dependent methods; None: the trained length.
        dtype: of the weights; the spectrum stays float32.
        device: cpu, cuda, or auto: its layers one after the other over all GPUs that this process sees.

    Raises:
        UserError: where weights are missing, or have other shapes than in the config.
    """
    exact_products()
    config = read_config(directory)
    check_causal(config, also=VISION_MODEL_TYPES)
    position = position_of(config).extended(extra)
    if extra or length is not None or position.depends_on_length:
        config = place_position(config, position, length)
    config.get_text_config().use_cache = False
    has_sdpa = has_vision(config) or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa
    implementation = "sdpa" if has_sdpa else "eager"
    spread = {"device_map": "auto"} if device == "auto" else {}
    model = load_whole(
        directory, config=config, dtype=getattr(torch, dtype), attn_implementation=implementation, **spread
    )
    if not spread:
        model.to(device)
    model.eval()
    install_spectrum(model)
    assert_spectrum(model, position.spectrum(length), position.other_layers)
    return model


def write_config(config: PreTrainedConfig, path: Path) -> None:
    """Write the config as config.json, in the form a stock engine loads: no attention of ours, cache on."""
    content = json.loads(config.to_json_string())
    for part in (content, content.get("text_config", {}), content.get("vision_config", {})):
        for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_autoset"):
            part.pop(key, None)
        if part.get("use_cache") is not None or part is content:
            part["use_cache"] = True
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
