"""The geometry of real checkpoints: ``python scripts/analyze.py geometry``."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from ropewalk.analysis.geometry.capture import LayerHeads, observe
from ropewalk.analysis.geometry.geometry_plan import Plan, Subject, make_plan
from ropewalk.analysis.geometry.measure import Findings, LayerMeasurement
from ropewalk.analysis.geometry.pca import basis_table
from ropewalk.analysis.geometry.table import (
    RECORD,
    STATISTICS,
    geometry_table,
    key_score_table,
    write_tables,
)
from ropewalk.config.analysis import GeometryConfig
from ropewalk.evaluation.settings import Setting
from ropewalk.figures.figure import FORMATS, write_figure
from ropewalk.figures.geometry import GEOMETRY_FIGURES, geometry_figures
from ropewalk.model.load import load_for_evaluation

PACKAGES = ("ropewalk", "torch", "transformers", "numpy")


def geometry(config: GeometryConfig) -> pd.DataFrame:
    """Measure queries and keys of every checkpoint before and after RoPE; write tables and figures.

    One forward pass over a document serves all lengths: the model is causal, so the first L positions are those of a
    document of L tokens. Where a checkpoint's chain depends on the input's length, each length has a pass of its own.
    One model is in memory at a time, and one layer's queries and keys.

    Returns:
        The table, as geometry.parquet holds it: ``table.COLUMNS``, with the statistics of ``table.STATISTICS``.

    Raises:
        UserError: for a wrong configuration, checkpoint or document, before a model is loaded.
        RuntimeError: where a model's queries and keys are not captured right.
    """
    plan = make_plan(config)
    print(_announce(plan), flush=True)
    findings = Findings()
    progress = _Progress(plan)
    for subject in plan.subjects:
        for setting in subject.settings:
            _measure(plan, subject, setting, findings, progress)
    table = geometry_table(findings.statistics)
    scores = key_score_table(findings.key_scores)
    clouds = pd.concat(findings.clouds, ignore_index=True) if findings.clouds else pd.DataFrame()
    _remove_earlier(plan)
    paths = _draw(plan, table, scores, clouds, findings)
    write_tables(plan.output, table, scores, clouds, _record(plan, findings))
    print(f"wrote {len(table):,} rows and {len(paths)} figures to {plan.output}", flush=True)
    return table


def _measure(plan: Plan, subject: Subject, setting: Setting, findings: Findings, progress: _Progress) -> None:
    config = plan.config
    model = load_for_evaluation(
        subject.directory, setting.extra, length=setting.longest, dtype=config.dtype, device=config.device
    )
    for number, ids in enumerate(plan.documents.values()):
        measurement = LayerMeasurement(plan, subject, setting, number == 0, findings)

        def observer(heads: LayerHeads, measurement: LayerMeasurement = measurement, number: int = number) -> None:
            measurement(heads)
            what = f"document {number + 1}/{len(plan.documents)}, layer {heads.layer}"
            progress.advance(setting.longest, f"{subject.name} to {setting.longest:,} tokens, {what}")

        observe(model, ids[: setting.longest], plan.layers, observer)
    del model
    gc.collect()  # hooks and modules refer to each other; two models would not fit


class _Progress:
    """A line for each layer, with the time left; work is judged by squared tokens."""

    def __init__(self, plan: Plan) -> None:
        passes = sum(setting.longest**2 for subject in plan.subjects for setting in subject.settings)
        self.total = passes * len(plan.documents) * len(plan.layers)
        self.done = 0
        self.started = time.perf_counter()

    def advance(self, tokens: int, what: str) -> None:
        self.done += tokens**2
        left = (time.perf_counter() - self.started) * (self.total - self.done) / self.done
        print(f"geometry {self.done / self.total:4.0%}  ETA {timedelta(seconds=round(left))}  {what}", flush=True)


def _remove_earlier(plan: Plan) -> None:
    """An earlier record goes first, so that where one stands, the tables and figures beside it are its own."""
    for name in (RECORD, *(f"{figure}.{suffix}" for figure in GEOMETRY_FIGURES for suffix in FORMATS)):
        (plan.output / name).unlink(missing_ok=True)


def _draw(
    plan: Plan, table: pd.DataFrame, scores: pd.DataFrame, clouds: pd.DataFrame, findings: Findings
) -> list[Path]:
    """Write every figure in every format (formats=[]: none); returns the paths."""
    if not plan.config.formats:
        return []
    figures = geometry_figures(
        table, scores, clouds, basis_table(findings.bases), findings.maps, plan.shape.head_dim
    )  # fmt: skip
    return [path for figure in figures for path in write_figure(figure, plan.output, plan.config.formats)]


def _announce(plan: Plan) -> str:
    lines = [f"geometry of layers {plan.layers}, {plan.shape.heads} heads over {plan.shape.key_heads} key heads"]
    for subject in plan.subjects:
        passes = "; ".join(f"{', '.join(f'{n:,}' for n in s.lengths)} under {s.chain}" for s in subject.settings)
        lines.append(f"{subject.name}: {passes}")
    lines.append(
        f"documents: {plan.counts['used']} of {plan.counts['window']:,} tokens; left out: {plan.counts['too_short']} "
        f"shorter, {plan.counts['beyond_max_documents']} beyond max_documents"
    )
    maps = ", ".join(f"layer {layer} head {head}" for layer, head in plan.map_heads)
    snapshots = ", ".join(f"layer {layer} key head {head}" for layer, head in plan.pca_heads)
    return "\n".join([*lines, f"attention maps: {maps or 'none'}; PCA: {snapshots or 'none'}"])


def _record(plan: Plan, findings: Findings) -> dict[str, Any]:
    """geometry.json: what was measured, on what, with what."""
    return {
        "config": asdict(plan.config),
        "models": [
            {
                "model": subject.name,
                "checkpoint": str(subject.directory),
                "passes": [
                    {
                        "chain": str(setting.chain),
                        "chain_sha256": setting.chain.sha256,
                        "lengths": list(setting.lengths),
                        "inv_freq": setting.spectrum.inv_freq.tolist(),
                        "attention_scaling": setting.spectrum.attention_scaling,
                    }
                    for setting in subject.settings
                ],
            }
            for subject in plan.subjects
        ],
        "shape": asdict(plan.shape),
        "layers": plan.layers,
        "documents": {"names": list(plan.documents), **plan.counts},
        "pca": [
            {"layer": layer, "kv_head": head, "variance_share": basis.share.tolist()}
            for (layer, head), basis in sorted(findings.bases.items())
        ],
        "statistics": STATISTICS,
        "versions": {name: version(name) for name in PACKAGES},
    }
