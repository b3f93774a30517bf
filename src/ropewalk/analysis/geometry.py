"""The geometry of real checkpoints: ``python scripts/analyze.py geometry``."""

from __future__ import annotations

import gc
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from ropewalk.analysis.capture import LayerHeads, observe
from ropewalk.analysis.geometry_plan import RECORD, Plan, Subject, make_plan
from ropewalk.analysis.measure import (
    STATISTICS,
    Findings,
    LayerMeasurement,
    geometry_table,
    key_score_table,
    write_tables,
)
from ropewalk.analysis.statistics import basis_table
from ropewalk.config.analysis import GeometryConfig
from ropewalk.evaluation.evaluated_checkpoint import Setting
from ropewalk.evaluation.model_reader import Progress
from ropewalk.figures.figure import FORMATS, write_figure
from ropewalk.figures.key_clouds import GEOMETRY_FIGURES, geometry_figures
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
    progress = Progress("geometry", _work(plan))
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


def _measure(plan: Plan, subject: Subject, setting: Setting, findings: Findings, progress: Progress) -> None:
    config = plan.config
    model = load_for_evaluation(
        subject.directory, setting.extra, length=setting.longest, dtype=config.dtype, device=config.device
    )
    for number, ids in enumerate(plan.windows.tokens.values()):
        measurement = LayerMeasurement(plan, subject, setting, number == 0, findings)

        def observer(heads: LayerHeads, measurement: LayerMeasurement = measurement, number: int = number) -> None:
            measurement(heads)
            what = f"document {number + 1}/{len(plan.windows.tokens)}, layer {heads.layer}"
            progress.advance(setting.longest**2, f"{subject.name} to {setting.longest:,} tokens, {what}")

        observe(model, ids[: setting.longest], plan.layers, observer)
    del model
    gc.collect()  # hooks and modules refer to each other; two models would not fit


def _work(plan: Plan) -> int:
    """Squared tokens of all passes, layers and documents."""
    passes = sum(setting.longest**2 for subject in plan.subjects for setting in subject.settings)
    return passes * len(plan.windows.tokens) * len(plan.layers)


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
    lines.append(str(plan.windows))
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
                "passes": [setting.record() for setting in subject.settings],
            }
            for subject in plan.subjects
        ],
        "shape": asdict(plan.shape),
        "layers": plan.layers,
        "documents": {"names": list(plan.windows.tokens), **plan.windows.counts()},
        "pca": [
            {"layer": layer, "kv_head": head, "variance_share": basis.share.tolist()}
            for (layer, head), basis in sorted(findings.bases.items())
        ],
        "statistics": STATISTICS,
        "versions": {name: version(name) for name in PACKAGES},
    }
