"""Build or load a model with its spectrum, through stock transformers alone, and assert that it is there."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging as transformers_logging

from ropewalk import attention
from ropewalk.config import SUPPORTED_MODEL_TYPES, ModelConfig
from ropewalk.rope import RopeChain, Spectrum
from ropewalk.rope.position import METADATA_KEY, Position, Steps, position_of

# float32 rounding of the factor, of base^x and of their product, relative to the float64 spectrum.
SPECTRUM_TOLERANCE = 2.4e-7

if not sys.stderr.isatty():
    transformers_logging.disable_progress_bar()  # a log file is no place for one


def _is_not_of_mscale(record: logging.LogRecord) -> bool:
    """transformers warns of the keys of a longrope entry that vLLM and SGLang need; they are there on purpose."""
    return "short_mscale" not in record.getMessage()


logging.getLogger("transformers.modeling_rope_utils").addFilter(_is_not_of_mscale)


def read_position(directory: str | Path) -> Position:
    """How the checkpoint in a Hugging Face directory rotates."""
    return position_of(AutoConfig.from_pretrained(directory))


def training_config(model: ModelConfig, rope_name: str, steps: Steps, sequence_length: int) -> PreTrainedConfig:
    """The transformers config of a training run: architecture, compiled chain, metadata.

    The run's chain follows the checkpoint's own, or replaces it where it starts with abf.

    Raises:
        ValueError: for an unsupported architecture, or a declared theta, head_dim or pretrained length that the
            checkpoint contradicts.
    """
    if model.path is None:
        architecture = dict(model.architecture)
        config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
        config.rope_parameters = {"rope_type": "default", "rope_theta": model.theta}
        config.max_position_embeddings = model.pretrained_length
    else:
        config = _read_config(model.path, model.revision)
    _check_architecture(config)
    origin = position_of(config)
    _check_declared(model, origin)
    own_chain = origin.chain.to_list()
    replaces = bool(steps) and steps[0]["method"] == "abf"
    position = Position(
        name=rope_name,
        chain=RopeChain(steps) if replaces else RopeChain([*own_chain, *steps]),
        theta=origin.theta,
        head_dim=origin.head_dim,
        pretrained_length=origin.trained_length,
        trained_length=sequence_length,
        base_model=model.path,
    )
    config.max_position_embeddings = sequence_length
    config.rope_parameters = position.rope_parameters(sequence_length)
    setattr(config, METADATA_KEY, position.metadata())
    config.use_cache = False
    return config


def _read_config(path: str, revision: str | None) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except OSError as error:
        raise ValueError(
            f"model.path={path} is neither a Hugging Face directory nor a hub model that can be reached; check the "
            f"path, or log in for a gated one ({str(error).splitlines()[0]})"
        ) from error


def _check_architecture(config: PreTrainedConfig) -> None:
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"model_type={config.model_type!r} is not supported; this trainer knows: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        raise ValueError(
            f"sliding_window={window}: training attends to whole documents; set sliding_window: null in the model's "
            "config.json (or model.architecture), and know that the model was not trained that way"
        )


def _check_declared(model: ModelConfig, origin: Position) -> None:
    actual = {"theta": origin.theta, "head_dim": origin.head_dim, "pretrained_length": origin.trained_length}
    for name, value in actual.items():
        declared = getattr(model, name)
        if declared != value:
            raise ValueError(
                f"model.{name}={declared}, but the checkpoint {model.path or 'architecture'} has {value}; "
                f"set model.{name}={value}"
            )


def build_for_training(
    config: PreTrainedConfig, path: str | None, dtype: torch.dtype, revision: str | None = None
) -> PreTrainedModel:
    """The model with document-masked attention; random weights where ``path`` is None.

    Under a live HfDeepSpeedConfig of stage 3 the parameters come out partitioned.
    """
    implementation = attention.register()
    if path is None:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, config=config, dtype=dtype, attn_implementation=implementation
        )
    model.config.architectures = [type(model).__name__]  # what vLLM and SGLang choose the class by
    return model


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a model with this config, tied ones once; no memory is taken for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


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
        length: tokens of the inputs, for length-dependent methods.
        dtype: of the weights; the spectrum stays float32.
        device: cpu or cuda.
    """
    config = AutoConfig.from_pretrained(directory)
    position = position_of(config)
    if extra or length is not None:
        config.rope_parameters = position.rope_parameters(config.max_position_embeddings, extra, length)
    config.use_cache = False
    model = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model.to(device).eval()
    install_spectrum(model)
    assert_spectrum(model, position.spectrum(extra, length))
    return model


def stock_spectrum(model: PreTrainedModel) -> tuple[Tensor, float]:
    """What transformers' own rope function computes from the model's config: the truth everywhere.

    Returns:
        inverse frequencies, float32 (head_dim / 2,) on the CPU, and the attention scaling.
    """
    rope_type = model.config.rope_parameters["rope_type"]
    rotary = model.get_decoder().rotary_emb
    compute = rotary.compute_default_rope_parameters if rope_type == "default" else ROPE_INIT_FUNCTIONS[rope_type]
    inv_freq, scaling = compute(model.config, device=torch.device("cpu"))
    return inv_freq, float(scaling)


def install_spectrum(model: PreTrainedModel) -> None:
    """Put the float32 spectrum back where a cast has rounded it.

    ``.to(bf16)`` and zero.Init cast the rotary buffers, and the longrope forward copies original_inv_freq over
    inv_freq at every call, so both are set. Call it after the engine is built and after every load.
    """
    truth, scaling = stock_spectrum(model)
    rotary = model.get_decoder().rotary_emb
    for name in ("inv_freq", "original_inv_freq"):
        device = getattr(rotary, name).device
        setattr(rotary, name, nn.Buffer(truth.to(device, copy=True), persistent=False))
    if model.config.rope_parameters["rope_type"] == "longrope":
        # Taken past the trained length; left out, it would be computed anew there, by the device's own pow.
        rotary.long_inv_freq = truth.to(device, copy=True)
    rotary.attention_scaling = scaling


def assert_spectrum(model: PreTrainedModel, spectrum: Spectrum) -> None:
    """Check that the model rotates with ``spectrum``: float32 buffers, bitwise the stock function's, and those within
    float32 rounding of the float64 spectrum, exact zeros exact.

    Raises:
        RuntimeError: naming what differs; a wrong spectrum must stop the run.
    """
    truth, scaling = stock_spectrum(model)
    rotary = model.get_decoder().rotary_emb
    for name in ("inv_freq", "original_inv_freq"):
        buffer = getattr(rotary, name)
        if buffer.dtype != torch.float32 or not torch.equal(buffer.cpu(), truth):
            raise RuntimeError(
                f"{name} is not the float32 spectrum of the config (dtype {buffer.dtype}); it was cast or overwritten"
            )
    stock, exact = truth.double().numpy(), spectrum.inv_freq
    if not np.array_equal(stock == 0, exact == 0):
        raise RuntimeError("the stopped pairs of the config are not those of the chain")
    turning = exact != 0
    worst = float(np.max(np.abs(stock[turning] / exact[turning] - 1), initial=0.0))
    tolerance = spectrum_tolerance(spectrum, model.config.rope_parameters["rope_type"])
    if worst > tolerance:
        raise RuntimeError(
            f"the config's spectrum differs from the chain's by {worst:.3g} relative, above {tolerance:.3g}"
        )
    if rotary.attention_scaling != scaling or abs(scaling / spectrum.attention_scaling - 1) > SPECTRUM_TOLERANCE:
        raise RuntimeError(f"attention scaling is {rotary.attention_scaling}, the chain's {spectrum.attention_scaling}")


def spectrum_tolerance(spectrum: Spectrum, rope_type: str) -> float:
    """How far the stock float32 function may be from the float64 spectrum, relative.

    Where head_dim is no power of two the exponent 2i/d is rounded too, by up to 2^-25, which ln(theta) magnifies.
    The stock yarn and llama3 functions also round their ramp, by some 1e-7 of the unscaled frequency, and the ramp's
    factor s magnifies that in the pairs that are slowed.
    """
    rounded_exponent = spectrum.head_dim & (spectrum.head_dim - 1) != 0
    tolerance = SPECTRUM_TOLERANCE + rounded_exponent * 2**-25 * math.log(spectrum.theta)
    return 20 * tolerance if rope_type in ("yarn", "llama3") else tolerance


def write_config(config: PreTrainedConfig, path: Path) -> None:
    """The config as config.json, in the form a stock engine loads: no attention of ours, cache on."""
    content = json.loads(config.to_json_string())
    content["use_cache"] = True
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_autoset"):
        content.pop(key, None)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
