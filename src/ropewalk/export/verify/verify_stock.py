"""Verification by stock transformers, and of the rotary tables of vLLM and SGLang, where installed, against it.

Transformers' logits of an export are compared with those of its source.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from ropewalk.export.output import STOCK, Finding, NotVerified, Unverifiable, judged, record
from ropewalk.export.source import Source, trained_source
from ropewalk.export.verify.check_export import Claim
from ropewalk.export.verify.probing import Passage, read_passage, run_probe, stock_logits
from ropewalk.model import attention
from ropewalk.model.hf_directory import StoredWeights, load_whole, read_config
from ropewalk.model.load import build_for_training, read_position
from ropewalk.model.rotary import (
    assert_spectrum,
    chain_rotation,
    inspect_config,
    install_spectrum,
    rope_entry,
    rotations,
    stock_tolerances,
)
from ropewalk.model.vision import embed
from ropewalk.rope import log_temperature, nope_layers
from ropewalk.rope.hf_config import rotating_layers

# Both sides compute in fp32 from the same weights; kernels differ in the order of their sums.
TOLERANCE = 1e-3  # of the logits' standard deviation
TABLE_TOLERANCE = 1e-5  # of cos and sin, at the positions compared
POSITIONS = 65536  # compared at most


def verify_export(checkpoint: Path, directory: Path) -> Finding:
    """Compare a training checkpoint with its export and record the finding; see :func:`verify_stock`.

    Raises:
        NotVerified: where they differ.
    """
    finding = record(directory, STOCK, lambda: verify_stock(trained_source(checkpoint), directory))
    if finding.passed is False:
        raise NotVerified(f"{directory}: {finding}")
    return finding


def verify_stock(source: Source, directory: Path, tokens: int | None = None) -> Finding:
    """Compare the source with the export in a process of stock transformers.

    The source is a training checkpoint in the trainer's model and attention, or the model directory itself, which
    transformers reads by itself here. Where the position follows the input's length, a second, shorter text lies on the
    near side of the length where it begins to.

    Args:
        source: what was exported.
        directory: where to.
        tokens: of the text; None: past the original length.

    Returns:
        passed where the logits are within tolerance and the frequencies equal. Its numbers, the larger of both texts:

        - max_abs_difference: largest difference of any logit.
        - logit_std: standard deviation of the source's logits, the scale to judge by.
        - tokens: length of the text; positions: of them, those whose logits were compared.
        - beyond_original: whether the text is longer than the model's original length.
        - spectrum_equal: whether the stock process rotates with the same frequencies: bitwise, or, where the export
          holds another stock form than training had, within what float32 rounding explains.
        - short_tokens: length of the second text; null without one.

    Raises:
        Unverifiable: where there is no tokenizer to read text with.
        RuntimeError: where the weights do not fit the source's own config, or transformers cannot run the export.
    """
    faults = Claim.of(directory).faults()
    passage = read_passage(directory, tokens)
    axes = source.position.axes
    if axes is not None:
        passage = passage.with_video(source.config, axes)
    passages = [passage]
    short = source.position.pretrained_length * 3 // 4
    if source.position.depends_on_length and 0 < short < len(passage.tokens):
        passages.insert(0, passage.cut(short))  # first, as the spectrum of a dynamic model grows with what it has seen
    config = _source_config(source)
    model = _source_model(source, config, directory)
    explained: NDArray[np.float64] | float = 0.0
    if rope_entry(config) != rope_entry(source.config):
        of_chain = stock_tolerances(source.position.spectrum(), rope_entry(config))
        text = config.get_text_config()
        kinds = rotating_layers(text.rope_parameters, getattr(text, "layer_types", None)) or [""]
        # the entries of layer types that no chain changes stay as they are
        explained = np.concatenate([of_chain * (kind == kinds[0]) for kind in sorted(kinds)])
    ours = [_source_logits(model, source, text) for text in passages]
    stock = stock_logits([directory], *passages)
    compared = [_compared(*own, found, source, explained) for own, found in zip(ours, stock, strict=True)]
    spectrum_equal = all(equal for _, _, equal in compared)
    difference, std, _ = max(compared, key=lambda numbers: numbers[0] / numbers[1])
    agrees = all(apart <= TOLERANCE * spread for apart, spread, _ in compared)  # not for NaN either
    count, beyond = len(passage.tokens), len(passage.tokens) > source.position.pretrained_length
    video = ", a video among them" if axes is not None else ""
    sides = f" and {short:,} (before it)" if len(passages) > 1 else ""
    return judged(
        agrees and spectrum_equal,
        f"stock transformers, unable to import ropewalk, differs by at most {difference:.2e} at {len(passage.rows)} "
        f"positions of {count:,} tokens{video}, {'past' if beyond else 'NOT past'} the original length{sides} (logits' "
        f"standard deviation {std:.3f}); frequencies {'equal' if spectrum_equal else 'DIFFER'}",
        faults,
        max_abs_difference=difference,
        logit_std=std,
        tokens=count,
        positions=len(passage.rows),
        beyond_original=beyond,
        spectrum_equal=spectrum_equal,
        short_tokens=short if len(passages) > 1 else None,
    )


def _compared(
    logits: NDArray[np.float32],
    inv_freq: NDArray[np.floating[Any]],
    stock: Mapping[str, NDArray[Any]],
    source: Source,
    explained: NDArray[np.float64] | float,
) -> tuple[float, float, bool]:
    """The largest difference of a logit, the source's standard deviation, and whether the frequencies are equal."""
    rotated = stock["inv_freq"].astype(np.float64)
    rotated = rotated[1:] if source.keeps_entry and source.position.depends_on_length else rotated  # after the text
    is_equal = bool(np.all(np.abs(rotated - inv_freq) <= explained * inv_freq))
    return float(np.abs(logits - stock["logits"]).max()), float(logits.std()), is_equal


def _source_config(source: Source) -> PreTrainedConfig:
    """The source's own config, the export's where steps were added to the chain."""
    is_own = source.keeps_entry
    if source.run_dir is not None:
        is_own = source.position.chain == read_position(source.origin).chain
    return read_config(source.origin) if is_own else source.config


def _source_model(source: Source, config: PreTrainedConfig, directory: Path) -> PreTrainedModel:
    """The source, its weights rounded to the export's dtype, so that only the path is compared."""
    config.use_cache = False
    if source.run_dir is not None:
        model = build_for_training(config, None, torch.float32)
        _load(model, source, directory)
    else:
        model = load_whole(source.origin, config=config, dtype=torch.float32)
        exported = StoredWeights(directory).dtypes
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(weight.to(exported.get(name, torch.float32)))
    model.eval()
    if not source.keeps_entry:
        install_spectrum(model)
        assert_spectrum(model, source.position.spectrum(), source.position.other_layers)
    return model


def _source_logits(
    model: PreTrainedModel, source: Source, passage: Passage
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (rows, vocabulary) and the frequencies (head_dim / 2,) that the source itself rotates with.

    Where layer types rotate differently, those of each, one after the other by the types' names.
    """
    count, further = len(passage.tokens), dict[str, Any]()
    if source.run_dir is not None:
        further = {"documents": attention.Documents.from_cu_seqlens(torch.tensor([0, count]), torch.device("cpu"))}
    rows = torch.from_numpy(passage.rows)
    with torch.no_grad():
        ids = torch.from_numpy(passage.tokens)[None]
        if passage.vision is not None:
            video = {"inputs_embeds": embed(model, ids, passage.vision), "position_ids": passage.vision.positions}
            hidden = model.get_decoder()(**video, **further, use_cache=False).last_hidden_state[0, rows]
            logits = model.get_output_embeddings()(hidden)
        else:
            logits = model(input_ids=ids, logits_to_keep=rows, **(further or {"use_cache": False})).logits[0]
    modules = sorted(rotations(model, count), key=lambda rotation: rotation.module)
    return logits.numpy(), torch.cat([rotation.inv_freq for rotation in modules]).numpy()


def _load(model: PreTrainedModel, source: Source, directory: Path) -> None:
    """Each weight by itself, rounded to the export's dtype: no second copy of the model."""
    weights, exported = source.open(), StoredWeights(directory).dtypes
    missing = dict(model.named_parameters())
    unfit = f"{source.origin} does not fit its own config"
    with torch.no_grad():
        for name in weights:
            if name not in missing:
                raise RuntimeError(f"{unfit}: it has {name}, which the model has not")
            missing.pop(name).copy_(weights.gather(name, exported[name]))
    if missing:
        raise RuntimeError(f"{unfit}: missing {sorted(missing)}")


def verify_table(engine: str, directory: Path, python: str | None = None) -> Finding:
    """Compare one engine's table, and its factor on queries where there is one; see :func:`compare_tables`.

    Args:
        engine: vllm or sglang.
        directory: the export.
        python: interpreter of the engine's own environment; None: it is looked for beside this package.

    Raises:
        Unverifiable: where it is not installed, or cannot build a table here.
    """
    if python is None and importlib.util.find_spec(engine) is None:
        raise Unverifiable(f"not verified: {engine} is not installed")
    claim = Claim.of(directory)
    if engine == "sglang" and claim.config.model_type == log_temperature.CARRIER:
        raise Unverifiable("not verified: sglang looks for the temperature's length elsewhere, so it computes another")
    if claim.config.model_type == nope_layers.CARRIER:
        reason = "runs this class by transformers' own code" if engine == "vllm" else "has no class for this model"
        raise Unverifiable(f"not verified: {engine} {reason}, so it has no table of its own")
    if claim.position.axes is not None:
        raise Unverifiable(f"not verified: {engine}'s table has one position a token, and this model three")
    if "rope_type" not in claim.config.rope_parameters:
        raise Unverifiable("not verified: its layers rotate in more than one way")
    positions = min(POSITIONS, claim.config.max_position_embeddings)
    table = engine_table(engine, directory, positions, python)
    return compare_tables(table, rotary_table(claim.config, positions), claim.faults())


def engine_table(engine: str, directory: Path, positions: int, python: str | None = None) -> dict[str, NDArray[Any]]:
    """cos and sin, (positions, rotated channels / 2), as an engine rotates, its factor on queries, and its version.

    Raises:
        Unverifiable: where it cannot.
    """
    try:
        return run_probe("table_probe.py", engine, [directory.resolve()], python, positions=positions)[0]
    except (RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1]
        raise Unverifiable(f"not verified: {engine} could not build its table here ({reason})") from None


def compare_tables(
    table: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[np.float32]], faults: list[str]
) -> Finding:
    """An engine's table against transformers'; passed where they agree within tolerance.

    Its numbers: version of the engine, max_abs_difference of any cos or sin, attention scaling included, or factor on
    queries, and positions, the rows compared, from position 0.
    """
    apart, positions = np.inf, len(expected["cos"])
    names = expected.keys() & {"cos", "sin", "query"}
    if all(table[name].shape == expected[name].shape for name in names):
        # np.max, since max() passes over a nan
        apart = float(np.max([np.abs(table[name] - expected[name]).max() for name in names]))
    return judged(
        apart <= TABLE_TOLERANCE,
        f"the rotary table of version {table['version']} differs by at most {apart:.2e} from transformers' over "
        f"{positions:,} positions",
        faults,
        version=str(table["version"]),
        max_abs_difference=apart,
        positions=positions,
    )


def rotary_table(config: PreTrainedConfig, positions: int) -> dict[str, NDArray[np.float32]]:
    """cos and sin as stock transformers computes them, float32 (positions, rotated channels / 2), scaling included.

    Of a model that scales queries by their position also ``query``, float32 (positions,).
    """
    rotation = chain_rotation(inspect_config(config, positions))
    rows = torch.arange(positions)
    angles = torch.outer(rows.float(), rotation.inv_freq)
    table = {"cos": angles.cos() * rotation.attention_scaling, "sin": angles.sin() * rotation.attention_scaling}
    if (temperature := rotation.temperature) is not None:
        table["query"] = get_llama_4_attn_scale(rows[None], temperature.beta, temperature.length).flatten()
    return {name: values.numpy() for name, values in table.items()}
