"""Static verification: a checkpoint's files, config and metadata against its claim, no engine run.

``python scripts/export.py check`` prints all of it; repair, inspection and the engines' verifications start from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from ropewalk.data.store.tokenizer_files import open_tokenizer
from ropewalk.errors import UserError
from ropewalk.export.card import CARD
from ropewalk.export.gguf.gguf_file import METADATA, gguf_fields, read_field
from ropewalk.export.gguf.gguf_model import FACTORS, GgufPosition, gguf_position
from ropewalk.export.output import Finding
from ropewalk.export.portable import older_form, text_part
from ropewalk.model.hf_directory import read_config, weight_faults
from ropewalk.model.rotary import Rotation, inspect_config, position_faults
from ropewalk.rope import Position, RopeChain
from ropewalk.rope.hf_config import REFERENCE_KEYS, naming, read_config_json, read_hf_position
from ropewalk.rope.log_temperature import VLLM_KEY
from ropewalk.rope.nope_layers import FOURTH, describe_layers
from ropewalk.rope.position import METADATA_KEY, position_of
from ropewalk.runs.directory import RunDirectory

TEMPERATURE = "attention.temperature_scale"  # below <architecture>
# The keys below <architecture>.rope that hold a GGUF file's position, and what llama.cpp takes for an absent one.
_ABSENT = {
    "freq_base": 1e4,
    "scaling.attn_factor": 1.0,
    "scaling.type": "none",
    **dict.fromkeys(f"scaling.{k}" for k in ("factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")),
}


@dataclass(frozen=True)
class Claim:
    """A checkpoint's config: the position that it claims, and what stock transformers makes of it.

    Attributes:
        content: config.json as it stands there.
        config: the same as stock transformers reads it.
    """

    content: Mapping[str, Any]
    config: PreTrainedConfig

    @classmethod
    def of(cls, model: str | Path) -> Claim:
        """The claim of a Hugging Face directory or hub id.

        Raises:
            UserError: where there is no config.json, or it is not JSON.
        """
        return cls(read_config_json(model), read_config(model, needs_chain=False))

    @cached_property
    def position(self) -> Position:
        """How the checkpoint rotates by its own words; UserError where no chain expresses them."""
        with naming(self.config.name_or_path):
            return position_of(self.config)

    @property
    def has_metadata(self) -> bool:
        """True if the chain is named in the config, not only read off the stock entry."""
        return bool(self.content.get(METADATA_KEY))

    @property
    def reference_keys(self) -> dict[str, Any]:
        """The keys of CoPE's published code, which stock engines ignore."""
        return {key: self.content[key] for key in REFERENCE_KEYS if key in self.content}

    @property
    def gguf(self) -> GgufPosition:
        """The position that a GGUF file of this checkpoint must have."""
        return gguf_position(self.position, self.config.get_text_config().max_position_embeddings)

    def rotations(self, length: int | None = None) -> list[Rotation]:
        """The rotations that stock transformers builds, read at ``length`` tokens; None: all that the model serves."""
        text = self.config.get_text_config()
        return inspect_config(self.config, length or getattr(text, "max_position_embeddings", None) or 1)

    def faults(self) -> list[str]:
        """The differences of stock transformers' rotation from the claimed one, in words; of every layer type."""
        position = self.position  # refused, before stock transformers tries to rotate with it
        if self.has_metadata or not position.depends_on_length:
            return position_faults(self.rotations(), position)
        lengths = (position.pretrained_length, 2 * position.trained_length)  # on both sides of the change
        return [fault for n in lengths for fault in position_faults(self.rotations(n), position, n)]

    def __str__(self) -> str:
        if self.has_metadata:
            return _named(self.position)
        if self.reference_keys:
            return f"{self.reference_keys} in config.json"
        return f"none beside the stock entry, which reads {self.position.chain}"


def print_check(model: str) -> bool:
    """Check a Hugging Face directory, a GGUF file or a run's export, and print the findings; True if all passed.

    Raises:
        UserError: where ``model`` is none of them.
    """
    path, run = Path(model), RunDirectory(Path(model))
    if run.config.is_file():
        if not run.export.is_dir():
            raise UserError(
                f"model={model} is a run without an export; python scripts/export.py checkpoint={model} makes one"
            )
        path = run.export
    claim, findings = check_gguf(path) if path.suffix == ".gguf" and path.is_file() else check_directory(path)
    print(f"claim: {claim}")
    for finding in sorted(findings, key=lambda finding: not finding.passed):
        print(f"{'ok' if finding.passed else 'FAULT'}: {finding}")
    passed = all(finding.passed for finding in findings)
    print(f"{path}: {'carries what it claims' if passed else 'does NOT carry what it claims, or is not whole'}")
    return passed


def check_directory(directory: Path) -> tuple[str, list[Finding]]:
    """The claim of a Hugging Face directory in words, and the findings on its config, card and files."""
    if not directory.is_dir():
        raise UserError(f"model={directory} is neither a Hugging Face directory nor a .gguf file; name one")
    files = sorted(directory.glob("*.gguf"))
    if files and not (directory / "config.json").is_file():
        checks = {path.name: check_gguf(path) for path in files}
        named = [Finding(f.passed, f"{name}: {f}") for name, (_, findings) in checks.items() for f in findings]
        return checks[files[0].name][0], named
    claim = Claim.of(directory)
    in_files = [f"{path.name}: {fault}" for path in files for fault in gguf_faults(path, claim.gguf)]
    checks_of = (
        (claim.faults(), "stock transformers rotates with the claimed chain"),
        (_card_faults(directory, claim), "the card names the same chain"),
        (_reference_faults(claim), "no key that stock engines ignore claims a method"),
        (_older_faults(claim), "transformers 4 reads the same entry"),
        (_vllm_faults(claim), "vLLM reads the same factor on queries"),
        (weight_faults(directory, claim.config), "every weight is there, in its shape"),
        (_tokenizer_faults(directory, claim), "the tokenizer fits the embedding"),
        (in_files, "the GGUF files beside it say the same position"),
    )
    return str(claim), [finding for faults, fact in checks_of for finding in _findings(faults, fact)]


def check_gguf(path: Path) -> tuple[str, list[Finding]]:
    """The claim in a GGUF file's own metadata, and the findings on the file."""
    fields, tensors = gguf_fields(path)
    arch = fields["general.architecture"]
    kind = fields.get(f"{arch}.rope.scaling.type")
    if kind == "longrope" and not any(name.startswith("rope_factors") for name in tensors):
        lost = "scaling type longrope without factor tensors: llama.cpp runs it as plain RoPE"
        return "longrope", [Finding(False, lost)]
    if not fields.get(METADATA):
        scaling = "with rope_freqs.weight" if tensors else (kind or "none")
        fact = f"it rotates at base {fields.get(f'{arch}.rope.freq_base')}, scaling {scaling}"
        return "none in the file", [Finding(True, fact)]
    position = position_of({METADATA_KEY: read_field(fields, METADATA)})
    faults = gguf_faults(path, gguf_position(position, int(fields[f"{arch}.context_length"])))
    return _named(position), _findings(faults, "base, factors and scaling are those of the claimed chain")


def gguf_faults(path: Path, expected: GgufPosition) -> list[str]:
    """The differences of a GGUF file's metadata and factors from ``expected``."""
    fields, tensors = gguf_fields(path)
    arch = fields["general.architecture"]
    written = {"freq_base": expected.freq_base, "scaling.attn_factor": expected.attn_factor}
    written |= {f"scaling.{key}": value for key, value in expected.scaling.items()}
    faults = _factor_faults(tensors.get(FACTORS), expected.factors)
    blocks = int(fields[f"{arch}.block_count"])
    present = [arch != "smollm3" or (layer + 1) % FOURTH != 0 for layer in range(blocks)]
    claimed = (True,) * blocks if expected.layers is None else expected.layers.rotate(blocks)
    if present != list(claimed):
        named = f"{describe_layers(present)}, not {describe_layers(claimed)}"
        faults.append(f"layers that llama.cpp's {arch} leaves without rotation: {named}")
    beta = 0.0 if expected.temperature is None else expected.temperature.beta
    scaled = fields.get(f"{arch}.{TEMPERATURE}", 0.0)
    if not np.isclose(scaled, beta, rtol=1e-6):
        faults.append(f"{TEMPERATURE} is {scaled:g}, not {beta:g}")
    for key, absent in _ABSENT.items():
        stored, wanted = fields.get(f"{arch}.rope.{key}", absent), written.get(key) or absent
        is_close = isinstance(stored, float) and wanted is not None and np.isclose(stored, wanted, rtol=1e-6)
        if stored != wanted and not is_close:
            faults.append(f"rope.{key} is {stored}, not {wanted}")
    return faults


def _factor_faults(stored: Any, expected: Any) -> list[str]:
    if stored is None or expected is None:
        both = stored is None and expected is None
        return [] if both else [f"{FACTORS} is {'missing' if stored is None else 'there, and should not be'}"]
    if stored.shape != expected.shape:
        return [f"{FACTORS} has {stored.size} factors, not {expected.size}"]
    wrong = np.flatnonzero(stored != expected)
    return [f"{FACTORS} differs at pairs {wrong.tolist()}"] if wrong.size else []


def _findings(faults: Iterator[str] | list[str], fact: str) -> list[Finding]:
    return [Finding(False, fault) for fault in faults] or [Finding(True, fact)]


def _named(position: Position) -> str:
    return f"{position.name}: {position.chain} (spectrum sha256 {position.sha256})"


def _card_faults(directory: Path, claim: Claim) -> Iterator[str]:
    card = directory / CARD
    named = re.search(r"^- chain: `(.+?)`", card.read_text(encoding="utf-8"), re.MULTILINE) if card.is_file() else None
    chain = claim.position.chain
    if named and RopeChain.parse(named.group(1)) != RopeChain.parse(str(chain)):
        yield f"the card names {named.group(1)}, the config {chain}"


def _reference_faults(claim: Claim) -> Iterator[str]:
    chain = claim.position.chain
    if claim.reference_keys and not any(step.method in ("cope", "hardclip") for step in chain.steps):
        clip = claim.content.get("cope_clip_n", "N")
        yield (
            f"{claim.reference_keys} in config.json are read by CoPE's published code alone; stock engines rotate with "
            f"{chain}: python scripts/export.py repair model=DIR rope=cope{clip} output=NEW_DIR"
        )


def _older_faults(claim: Claim) -> Iterator[str]:
    content = text_part(claim.content)
    section = content.get("rope_parameters", {}).get("mrope_section", ())
    if len(section) % 3:
        yield (
            f"mrope_section has {len(section)} numbers; transformers before 5 repeats the list for the other half of a "
            f"head, where they then name other axes: write {[*section, *[0] * (-len(section) % 3)]}"
        )
    if claim.has_metadata and "rope_type" in claim.config.get_text_config().rope_parameters:
        missing = [key for key, value in older_form(claim.config).items() if content.get(key) != value]
        if missing:
            read = read_hf_position({**content, "rope_parameters": None})
            yield (
                f"{', '.join(missing)} is not as transformers before 5 needs it: it reads base {read.theta:g} and "
                f"{RopeChain(read.chain)}"
            )


def _vllm_faults(claim: Claim) -> Iterator[str]:
    """vLLM looks for a log temperature beside rope_parameters, where Mistral's own config.json has none."""
    temperature = claim.position.temperature
    read = claim.content.get(VLLM_KEY)
    if temperature is not None and read != temperature.vllm_keys():
        yield (
            f"{VLLM_KEY}={read}, by which vLLM scales queries, is not that of rope_parameters; write {VLLM_KEY}="
            f"{temperature.vllm_keys()} into config.json"
        )


def _tokenizer_faults(directory: Path, claim: Claim) -> Iterator[str]:
    if not (directory / "tokenizer.json").is_file():
        yield "no tokenizer.json"
        return
    try:
        entries = len(open_tokenizer(directory))
    except UserError as error:
        yield str(error)
        return
    if entries > claim.config.get_text_config().vocab_size:
        yield f"the tokenizer has {entries} entries, the model {claim.config.get_text_config().vocab_size} embeddings"
