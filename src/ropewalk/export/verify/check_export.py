"""Whether a directory or GGUF file really carries the method that it claims: ``python scripts/export.py check``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from ropewalk.errors import UserError
from ropewalk.export.card import CARD
from ropewalk.export.gguf.gguf_check import claimed_position, position_faults
from ropewalk.export.gguf.gguf_file import gguf_fields
from ropewalk.export.gguf.gguf_position import gguf_position
from ropewalk.export.portable import older_form
from ropewalk.export.safetensors_files import weight_faults
from ropewalk.model.rotary import spectrum_tolerance
from ropewalk.model.rotations import inspect_config
from ropewalk.rope import Position, RopeChain
from ropewalk.rope.hf_config import REFERENCE_KEYS, read_hf_position
from ropewalk.rope.position import METADATA_KEY, position_of, read_config_json


@dataclass
class Check:
    """What a check found.

    Attributes:
        claim: the method that is claimed, in words.
        facts: what holds.
        faults: what does not.
    """

    claim: str
    facts: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def print_check(model: str) -> bool:
    """Check a Hugging Face directory or GGUF file and print what was found; whether it carries what it claims.

    Raises:
        UserError: where ``model`` is neither.
    """
    path = Path(model)
    found = check_gguf(path) if path.suffix == ".gguf" and path.is_file() else check_directory(path)
    print(f"claim: {found.claim}")
    for fact in found.facts:
        print(f"ok: {fact}")
    for fault in found.faults:
        print(f"FAULT: {fault}")
    print(
        f"{path}: {'carries what it claims' if not found.faults else 'does NOT carry what it claims, or is not whole'}"
    )
    return not found.faults


def check_directory(directory: Path) -> Check:
    """A Hugging Face directory: config, card, weights, tokenizer, and the GGUF files in it."""
    if not directory.is_dir():
        raise UserError(f"model={directory} is neither a Hugging Face directory nor a .gguf file; name one")
    if not (directory / "config.json").is_file() and (files := sorted(directory.glob("*.gguf"))):
        checks = [check_gguf(path) for path in files]
        return Check(
            checks[0].claim,
            [f"{path.name}: {fact}" for path, one in zip(files, checks, strict=True) for fact in one.facts],
            [f"{path.name}: {fault}" for path, one in zip(files, checks, strict=True) for fault in one.faults],
        )
    content = read_config_json(directory)
    position = position_of(content)
    found = Check(_claim(content, position))
    config = AutoConfig.from_pretrained(directory)
    for faults, fact in (
        (_spectrum_faults(config, position), "stock transformers rotates with the claimed chain"),
        (_card_faults(directory, position), "the card names the same chain"),
        (_reference_faults(content, position), "no key that stock engines ignore claims a method"),
        (_older_faults(content, config), "transformers 4 reads the same entry"),
        (weight_faults(directory, config), "every weight is there, in its shape"),
        (_tokenizer_faults(directory, config), "the tokenizer fits the embedding"),
        (_gguf_faults(directory, config, position), "the GGUF files beside it say the same position"),
    ):
        listed = list(faults)
        found.faults += listed
        if not listed:
            found.facts.append(fact)
    return found


def check_gguf(path: Path) -> Check:
    """A GGUF file against the claim in its own metadata."""
    fields, tensors = gguf_fields(path)
    arch = fields["general.architecture"]
    position = claimed_position(fields)
    kind = fields.get(f"{arch}.rope.scaling.type")
    if kind == "longrope" and not any(name.startswith("rope_factors") for name in tensors):
        return Check("longrope", [], ["scaling type longrope without factor tensors: llama.cpp runs it as plain RoPE"])
    if position is None:
        scaling = "with rope_freqs.weight" if tensors else (kind or "none")
        return Check(
            "none in the file", [f"it rotates at base {fields.get(f'{arch}.rope.freq_base')}, scaling {scaling}"]
        )
    served = int(fields[f"{arch}.context_length"])
    faults = position_faults(path, gguf_position(position, served))
    return Check(
        _named(position), [] if faults else ["base, factors and scaling are those of the claimed chain"], faults
    )


def _named(position: Position) -> str:
    return f"{position.name}: {position.chain} (spectrum sha256 {position.sha256})"


def _claim(content: Mapping[str, Any], position: Position) -> str:
    if content.get(METADATA_KEY):
        return _named(position)
    present = {key: content[key] for key in REFERENCE_KEYS if key in content}
    return f"{present} in config.json" if present else f"none beside the stock entry, which reads {position.chain}"


def _spectrum_faults(config: PreTrainedConfig, position: Position) -> Iterator[str]:
    rotations = inspect_config(config, config.max_position_embeddings)
    rotation = next((one for one in rotations if "full_attention" in one.module), rotations[0])
    spectrum = position.spectrum()
    stock, exact = rotation.inv_freq.double().numpy(), spectrum.inv_freq
    if stock.shape != exact.shape:
        yield f"stock transformers rotates {stock.size} pairs, the claimed chain {exact.size}"
        return
    apart = np.abs(stock - exact)
    wrong = np.flatnonzero(
        (apart > spectrum_tolerance(spectrum, rotation.rope_type) * exact) | ((stock == 0) != (exact == 0))
    )
    if wrong.size:
        yield f"stock transformers rotates other than the claimed chain at pairs {wrong.tolist()}"
    if not np.isclose(rotation.attention_scaling, spectrum.attention_scaling, rtol=1e-6):
        yield f"attention scaling is {rotation.attention_scaling:g}, the claimed chain's {spectrum.attention_scaling:g}"


def _card_faults(directory: Path, position: Position) -> Iterator[str]:
    card = directory / CARD
    named = re.search(r"^- chain: `(.+?)`", card.read_text(encoding="utf-8"), re.MULTILINE) if card.is_file() else None
    if named and RopeChain.parse(named.group(1)) != RopeChain.parse(str(position.chain)):
        yield f"the card names {named.group(1)}, the config {position.chain}"


def _reference_faults(content: Mapping[str, Any], position: Position) -> Iterator[str]:
    present = {key: content[key] for key in REFERENCE_KEYS if key in content}
    if present and not any(step.method in ("cope", "hardclip") for step in position.chain.steps):
        clip = content.get("cope_clip_n", "N")
        yield (
            f"{present} in config.json are read by CoPE's published code alone; stock engines rotate with "
            f"{position.chain}: python scripts/export.py repair model=DIR rope=cope{clip} output=NEW_DIR"
        )


def _older_faults(content: Mapping[str, Any], config: PreTrainedConfig) -> Iterator[str]:
    if METADATA_KEY in content and "rope_type" in config.rope_parameters:
        expected = older_form(config)
        missing = [key for key, value in expected.items() if content.get(key) != value]
        if missing:
            read = read_hf_position({**content, "rope_parameters": None})
            yield (
                f"{', '.join(missing)} is not as transformers before 5 needs it: it reads base {read.theta:g} and "
                f"{RopeChain(read.chain)}"
            )


def _tokenizer_faults(directory: Path, config: PreTrainedConfig) -> Iterator[str]:
    if not (directory / "tokenizer.json").is_file():
        yield "no tokenizer.json"
        return
    entries = len(AutoTokenizer.from_pretrained(directory))
    if entries > config.vocab_size:
        yield f"the tokenizer has {entries} entries, the model {config.vocab_size} embeddings"


def _gguf_faults(directory: Path, config: PreTrainedConfig, position: Position) -> Iterator[str]:
    for path in sorted(directory.glob("*.gguf")):
        for fault in position_faults(path, gguf_position(position, config.max_position_embeddings)):
            yield f"{path.name}: {fault}"
