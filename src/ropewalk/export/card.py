"""The model card of an export, README.md: the weights, their making, and how to serve them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from httpx2 import HTTPError
from huggingface_hub import ModelCard, hf_hub_download
from transformers import PreTrainedConfig

from ropewalk.errors import in_one_line
from ropewalk.export.output import SOURCE, STOCK, findings_of
from ropewalk.export.source import Source
from ropewalk.files import read_object, write_atomically
from ropewalk.model.load import cache_bytes
from ropewalk.model.rotary import rope_entry
from ropewalk.model.vision import placeholders, tokens_per_second, tower_geometry
from ropewalk.rope import log_temperature, nope_layers
from ropewalk.rope.nope_layers import describe_layers
from ropewalk.rope.pair_axes import PairAxes, Rule
from ropewalk.runs.directory import RunDirectory, read_manifest
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.runs.record import recorded_at

CARD = "README.md"


def write_card(source: Source, directory: Path, licence: str | None) -> None:
    """Write README.md for an export, from what its run, its checkpoint and its verifications left behind.

    Args:
        source: what was exported.
        directory: the export.
        licence: of the base model; None: what the base's own card says, else unknown.
    """
    licence = licence or base_licence(source)
    sections = [
        _what(source, directory),
        _position(source),
        _training(source),
        _metrics(source),
        _verification(directory),
        ["## Serving", "", *commands(source, directory)],
        _licence(source, licence),
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines)
    write_atomically(directory / CARD, f"{_front_matter(source, directory, licence)}\n{text}\n")


def base_licence(source: Source) -> str | None:
    """The licence that the base model's own card declares, where that card can be read."""
    base = source.origin if source.run_dir is None else _base(source)
    if base is None:
        return None
    try:
        local = Path(base) / CARD
        path = local if Path(base).is_dir() else Path(hf_hub_download(str(base), CARD))
        licence = ModelCard.load(path).data.to_dict().get("license") if path.is_file() else None
    except (OSError, ValueError, HTTPError, yaml.YAMLError):
        return None
    return None if licence is None else str(licence)


def _base(source: Source) -> str | None:
    return source.position.base_model


def _base_name(source: Source) -> str:
    """The base as others know it: a hub id, or the last part of a path on this machine."""
    base = _base(source) or (None if source.run_dir is not None else str(source.identity["model"]))
    if base is None:
        return "none: trained from random weights" if source.run_dir is not None else "not recorded"
    return Path(base).resolve().name if Path(base).is_absolute() or Path(base).exists() else base


def _front_matter(source: Source, directory: Path, licence: str | None) -> str:
    base = _base_name(source)
    data: dict[str, Any] = {
        "license": licence or "other",
        "library_name": "transformers" if (directory / "config.json").is_file() else "gguf",
        "pipeline_tag": "text-generation" if source.position.axes is None else "image-text-to-text",
        "tags": ["ropewalk", "long-context", source.position.name],
    }
    if "/" in base and not base.startswith("none"):
        data["base_model"] = base
    return f"---\n{yaml.safe_dump(data, sort_keys=False).strip()}\n---"


def _what(source: Source, directory: Path) -> list[str]:
    title = source.run_dir.name if source.run_dir is not None else f"{_base_name(source)}, {source.position.name}"
    made = read_object(directory / SOURCE)
    step = (
        f"step {made['step']:,} of the run" if "step" in made else "not trained here: the method was applied as it is"
    )
    if "average" in made:
        members = ", ".join(f"{member['run']} step {member['step']:,}" for member in made["average"])
        step = f"mean of the fp32 weights of {len(made['average'])} checkpoints ({members})"
    files = sorted(path.name for path in directory.glob("*.gguf"))
    return [
        f"# {title}",
        "",
        f"{type(source.config).__name__.removesuffix('Config')} weights in {made.get('dtype')}"
        f"{', with ' + ', '.join(files) if files else ''}; {step}. Base model: {_base_name(source)}.",
        "It is loaded by stock engines; no code of its own is needed.",
    ]


def _position(source: Source) -> list[str]:
    position, config = source.position, source.config.get_text_config()
    count = config.num_hidden_layers
    still = describe_layers(position.layers.rotate(count)) if position.layers is not None else ""
    return [
        "## Position",
        "",
        f"- chain: `{position.chain}`",
        f"- spectrum sha256: `{position.sha256}` (of the chain and its inputs), chain sha256 `{position.chain.sha256}`",
        f"- base {position.theta:g}, {position.head_dim} rotating channels a head, pretrained at "
        f"{position.pretrained_length:,} tokens, trained at {position.trained_length:,}, served to "
        f"{config.max_position_embeddings:,}",
        f"- attention scaling {position.spectrum().attention_scaling:.6g}, "
        f"{int((position.spectrum().inv_freq == 0).sum())} of {position.head_dim // 2} pairs do not rotate",
        *(
            f"- {kind} layers keep their own rotation: `{own.chain}`, base {own.theta:g}"
            for kind, own in position.other_layers.items()
        ),
        *([] if position.axes is None else [f"- axes: {position.axes}"]),
        *([] if position.layers is None else [f"- layers (of {count}, from 0) without rotation: {still}"]),
        *([] if position.temperature is None else [f"- {position.temperature}"]),
        "",
        "`python scripts/export.py check DIR` of ropewalk tells whether a copy still carries it.",
    ]


def _training(source: Source) -> list[str]:
    if source.run_dir is None:
        return ["## Training", "", "None. The method changes the model without training; measure before relying on it."]
    run, manifest = RunDirectory(source.run_dir), read_manifest(source.origin)
    contract = manifest.get("contract", {})
    settings: Any = recorded_at(run.root) or {}
    record = read_object(run.record)
    trainer = settings.get("trainer", {})
    tokens = manifest["step"] * contract.get("global_batch_size", 0)
    tokens *= contract.get("sequence_length", 0)
    return [
        "## Training",
        "",
        f"- {tokens:,} tokens in sequences of {contract.get('sequence_length', 0):,}, "
        f"{contract.get('global_batch_size', 0):,} sequences a step, seed {contract.get('seed')}",
        f"- AdamW, learning rate {trainer.get('learning_rate')}, weight decay {trainer.get('weight_decay')}, "
        f"gradient clipping {trainer.get('gradient_clipping')}, {trainer.get('dtype')}, ZeRO stage "
        f"{settings.get('deepspeed', {}).get('stage')}, {record.get('world_size')} ranks",
        f"- code {record.get('git_commit')}; {_joined(record.get('versions', {}))}",
        f"- data (share of the tokens): {_joined(_shares(contract.get('weights', {})))}",
        f"- store `{contract.get('store')}`",
        *([f"- curriculum: {json.dumps(contract['curriculum'])}"] if contract.get("curriculum") else []),
    ]


def _shares(weights: Mapping[str, Any]) -> dict[str, str]:
    """Weights may be fractions in text, 803/826, as the data order keeps them exact."""

    def share(text: str) -> float:
        above, _, below = str(text).partition("/")
        return float(above) / float(below or 1)

    return {name: f"{share(weight):.1%}" for name, weight in weights.items()}


def _joined(entries: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in entries.items()) or "not recorded"


def _metrics(source: Source) -> list[str]:
    if source.run_dir is None:
        return []
    lines = ["## Metrics", ""]
    rows = [row for row in read_metrics(source.run_dir) if row["step"] <= source.identity["step"]]
    if rows:
        lines.append(f"- training loss at step {rows[-1]['step']:,}: {rows[-1]['loss']:.4f} nats per token")
    lines += _evaluated(RunDirectory(source.run_dir).evaluation / "table.parquet")
    return lines if len(lines) > 2 else [*lines, "None were recorded."]


def _evaluated(path: Path) -> Iterator[str]:
    """The losses by context length of the run's own evaluation, where there is one."""
    if not path.is_file():
        return
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        yield f"- its evaluation is there and cannot be read ({in_one_line(error)})"
        return
    table = table[(table["task"] == "loss_at_length") & (table["metric"] == "nll")]
    for _, row in table.sort_values("context_length").iterrows():
        spread = f" ± {row['stderr']:.4f}" if np.isfinite(row["stderr"]) else ""
        yield (
            f"- held-out loss at {int(row['context_length']):,} tokens, test-time scaling {row['test_time_scaling']}: "
            f"{row['value']:.4f}{spread} nats per token ({int(row['n'])} documents)"
        )


def _verification(directory: Path) -> list[str]:
    findings = findings_of(directory)
    if not findings:
        return [
            "## Verification",
            "",
            "None was run (verify=false): no engine's output was compared with the source's.",
        ]
    missing = [] if STOCK in findings else [f"- {STOCK}: not verified"]
    return [
        "## Verification",
        "",
        *missing,
        *(f"- {engine}: {finding['said']}" for engine, finding in findings.items()),
    ]


def _licence(source: Source, licence: str | None) -> list[str]:
    if licence is not None:
        return [
            "## Licence",
            "",
            f"{licence}, that of the base model ({_base_name(source)}); its terms hold for these weights.",
        ]
    return [
        "## Licence",
        "",
        f"Not known: no card of the base model ({_base_name(source)}) could be read. Its licence holds for these "
        "weights; look it up and put it here before you share them (`license=NAME` writes it).",
    ]


# Of the classes that carry more than frequencies: the first transformers with them, and what other engines do.
_CARRIED = {
    nope_layers.CARRIER: (
        "4.53",
        "vLLM runs this class by transformers' own code; its speed was not measured. SGLang has no class for it, so no "
        "command is given.",
    ),
    log_temperature.CARRIER: (
        "5.0",
        f"vLLM reads the temperature from `{log_temperature.VLLM_KEY}`, transformers from `rope_parameters`; keep both "
        "keys. SGLang's class looks for its length elsewhere, so no command is given.",
    ),
}


def commands(source: Source, directory: Path) -> list[str]:
    """Markdown lines for a model card; DIR stands for the directory of the files."""
    config, position = source.config.get_text_config(), source.position
    served, carried = config.max_position_embeddings, _CARRIED.get(config.model_type)
    oldest = carried[0] if carried else "4.45"
    lines = [
        f"Keys and values of one sequence of {served:,} tokens take "
        f"{cache_bytes(config, served) / 2**30:.3g} GiB in bf16.",
    ]
    if position.axes is not None:
        lines += ["", *video_commands(source.config, position.axes)]
    elif (directory / "config.json").is_file():
        lines += [
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")  # transformers {oldest} or later',
            'tokenizer = AutoTokenizer.from_pretrained("DIR")',
            "```",
            "",
            "```bash",
            f"vllm serve DIR --max-model-len {served}",
            *([] if carried else [f"python -m sglang.launch_server --model-path DIR --context-length {served}"]),
            "```",
        ]
        lines += ["", carried[1]] if carried else []
    files = sorted(path.name for path in directory.glob("*.gguf"))
    if position.depends_on_length and (files or not source.keeps_entry):
        held = "the GGUF files hold" if source.keeps_entry else "these files hold"
        lines += ["", f"The chain follows the input's length; {held} it at {position.trained_length:,} tokens."]
    if files:
        lines += ["", "```bash", *(f"llama-server --model DIR/{name} --ctx-size {served}" for name in files), "```"]
    return lines


# Positions of one grid and where what follows begins, by rule; ropewalk.rope.video_positions has the formulas.
_CORNER = "parts.append(p + torch.stack([(step * k + 1e-6).floor(), i, j]))"  # 49 times 1/49 is below 1
_PLACED: dict[Rule, tuple[str, ...]] = {
    "mrope": (_CORNER, "p = float(parts[-1].max()) + 1"),
    "mrope_v5": (_CORNER, "p += max(rows, columns)"),
    "diagonal": (
        "t = p + step * k",
        "parts.append(torch.stack([t, t + i - (rows - 1) // 2, t + j - (columns - 1) // 2]))",
        "p = float(t[-1]) + 1",
    ),
    "index": ("parts.append((p + torch.arange(tokens).double()).expand(3, -1))", "p += tokens"),
}


def video_commands(config: PreTrainedConfig, axes: PairAxes) -> Iterator[str]:
    """The lines that load a model of images and videos, and that make the position ids that it was trained with."""
    (image, video), merge, seconds = placeholders(config), tower_geometry(config).merge_size, tokens_per_second(config)
    served, entry = config.get_text_config().max_position_embeddings, rope_entry(config)
    if axes.positions == "diagonal":
        step = f"the temporal scale; trained with {', '.join(f'{scale:g}' for scale in axes.temporal_scales)}"
    elif seconds is not None and axes.positions != "index":
        step = f"{seconds:g} times the seconds between two frames"
    else:
        step = "unused: 1"
    yield from (
        "```python",
        "import torch",
        "from transformers import AutoModelForImageTextToText, AutoTokenizer",
        "",
        'model = AutoModelForImageTextToText.from_pretrained("DIR", dtype="auto")  # transformers 4.57 or later',
        'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        "",
        f"# grids: rows of image_grid_thw and video_grid_thw in their order; step: {step}",
        "def position_ids(input_ids, grids, step=1.0):",
        f"    is_visual = torch.isin(input_ids[0].cpu(), torch.tensor([{image}, {video}]))",
        "    parts, p, n = [], 0.0, 0",
        "    for frames, rows, columns in grids.tolist():",
        f"        rows, columns = rows // {merge}, columns // {merge}",
        "        start, tokens = n + int(is_visual[n:].nonzero()[0]), frames * rows * columns",
        "        parts.append((p + torch.arange(start - n).double()).expand(3, -1))",
        "        p, n = p + start - n, start + tokens",
        "        k, i, j = torch.cartesian_prod(*map(torch.arange, (frames, rows, columns))).T.double()",
        *(f"        {line}" for line in _PLACED[axes.positions]),
        "    parts.append((p + torch.arange(len(is_visual) - n).double()).expand(3, -1))",
        "    return torch.cat(parts, 1).float()[:, None]  # (3, 1, tokens), never bfloat16, which rounds 1000.75",
        "```",
        "",
        "`model(**inputs, position_ids=...)` and `model.generate(**inputs, position_ids=...)` take them. Without them "
        "transformers counts by a rule of its own, whatever the model was trained with: version 5 as `mrope_v5`, "
        "version 4 as `mrope`.",
        "",
    )
    if axes.layout == "bands" and axes.positions == "mrope" and entry["rope_type"] == "default":
        yield from ("```bash", f"vllm serve DIR --max-model-len {served}", "```", "")
        yield "By its source, vLLM counts positions by the same rule; it was not run. No other engine was looked at."
    else:
        yield (
            "By their sources, vLLM, SGLang and llama.cpp lose this layout, its factors or its positions without a "
            "word, so no command is given."
        )
