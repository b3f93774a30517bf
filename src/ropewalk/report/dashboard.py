"""The W&B workspace and report of a project: ``python scripts/dashboard.py project=...``, and their panels.

wandb-workspaces has no public way to see what it would send, so :func:`built` calls its private ``_to_model``; the
version is pinned for that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.config.evaluation import DashboardConfig
from ropewalk.errors import UserError
from ropewalk.figures.needle_grid import EXACT_MATCH, TOKEN_ACCURACY
from ropewalk.files import read_object, write_atomically
from ropewalk.report import tracked

try:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr
except ImportError as error:
    _missing = error.name
else:
    _missing = None

METHOD = "rope.name"  # of a run's configuration
# Configuration columns of the table of runs; the first part is the key that runs log, so ".value" follows it.
COLUMNS = (
    METHOD, "run.chain", "run.trained_length", "model.name", "data.sequence_length", "trainer.seed",
    "trainer.max_steps", "trainer.learning_rate", "trainer.global_batch_size", "run.parameters", "run.git_commit",
)  # fmt: skip
PUSHED = "pushed.json"  # what to update the next time
TRAIN = "train/"
WIDTH, HEIGHT, IN_A_ROW = 8, 6, 3  # of a panel, in units of which a row has 24; panels in a row
ID_LETTERS = 12
SHORT_TASKS = ("mmlu/acc", "gsm8k/exact_match", "arc_challenge/acc_norm", "hellaswag/acc_norm", "piqa/acc_norm")


def dashboard(config: DashboardConfig) -> list[Path]:
    """Write workspace.json and report.json into ``config.output``; with ``config.push`` also save both to W&B.

    Returns:
        The two files.

    Raises:
        UserError: where wandb-workspaces is not installed, or W&B cannot be reached with an account.
    """
    workspace, report = built(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, model in (("workspace", workspace._to_model()), ("report", report._to_model())):
        path = output / f"{name}.json"
        write_atomically(path, as_json(model))
        print(path, flush=True)
        written.append(path)
    if config.push:
        push(workspace, report, output)
    return written


def as_json(model: Any) -> str:
    """A model of wandb-workspaces as it goes to the server, keys sorted and indented."""
    content = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def built(config: DashboardConfig) -> tuple[Any, Any]:
    """The workspace and the report, neither saved anywhere."""
    if _missing is not None:
        raise UserError(f"{_missing} is not installed, which builds W&B dashboards; pip install 'ropewalk[dashboard]'")

    workspace = ws.Workspace(
        entity=config.entity or "",
        project=config.project,
        name=config.title,
        sections=[ws.Section(name=section.name, panels=section.panels, is_open=True) for section in sections()],
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=50),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Config(METHOD)], pinned_columns=[_column(name) for name in COLUMNS]
        ),
    )
    workspace._internal_runset_id = fixed_id("workspace")
    report = wr.Report(
        project=config.project,
        entity=config.entity or "",
        title=config.title,
        description="Position methods of continued pretraining, grouped by method. Made by scripts/dashboard.py.",
        blocks=[block for section in sections() for block in _blocks(section)],
        width="fluid",
    )
    return workspace, report


def _blocks(section: PanelSection) -> list[Any]:
    """Heading, reading and grid of a section of the report; the runs are those of the report's own project."""
    runs = wr.Runset(name="All runs", groupby=[f"config.{METHOD}"], visible_columns=[_column(name) for name in COLUMNS])
    runs._id = fixed_id(f"report {section.name}")
    return [wr.H2(section.name), wr.P(section.reading), wr.PanelGrid(runsets=[runs], panels=section.panels)]


def _column(name: str) -> str:
    """A nested configuration key as W&B addresses it: the logged key, ``.value``, the rest."""
    top, _, rest = name.partition(".")
    return f"config:{top}.value.{rest}"


def push(workspace: Any, report: Any, output: Path) -> None:
    """Save both to W&B: what an earlier push from ``output`` made is updated, else it is new.

    Raises:
        UserError: without an account, or where the server refuses.
    """
    import wandb

    pushed = output / PUSHED
    known = read_object(pushed)
    try:
        if not workspace.entity:
            workspace.entity = report.entity = wandb.Api().default_entity
        project = f"{workspace.entity}/{workspace.project}"
        known = known if known.get("place") == project else {}
        if known:
            workspace._internal_name, workspace._internal_id = known["workspace"]
            report.id = known.get("report", "")
        workspace.save()
        saved = {**known, "place": project, "workspace": [workspace._internal_name, workspace._internal_id]}
        write_atomically(pushed, json.dumps(saved) + "\n")  # at once: a report that fails leaves no second workspace
        report.save()
        write_atomically(pushed, json.dumps({**saved, "report": report.id}) + "\n")
    except (wandb.Error, ValueError) as error:
        raise UserError(
            f"push=true: W&B did not take the dashboard ({error}); log in (wandb login), and name a project "
            "that you may write to (project=..., entity=...)"
        ) from error
    print(f"{workspace.url}\n{report.url}", flush=True)


@dataclass(frozen=True)
class PanelSection:
    """A heading, one sentence on how to read what is under it, and its panels."""

    name: str
    reading: str
    panels: list[Any]


def sections() -> list[PanelSection]:
    """Training, loss by position, needle, RULER, HELMET, short context, throughput and the figures of the report.

    Panels have an id made from section and number, where the library would draw one at random.
    """
    training, throughput = _of_training()
    made = [training, *_of_evaluations(), throughput, _figures()]
    for section in made:
        for i, panel in enumerate(section.panels):
            panel._id = fixed_id(f"{section.name} {i}")
            panel.layout = wr.Layout(x=WIDTH * (i % IN_A_ROW), y=HEIGHT * (i // IN_A_ROW), w=WIDTH, h=HEIGHT)
    return made


def fixed_id(name: str) -> str:
    """An id in W&B's form that is the same every time."""
    return hashlib.sha256(name.encode()).hexdigest()[:ID_LETTERS]


def _over(axis: str, axis_title: str, *, log: bool) -> Callable[..., Any]:
    """A line plot over ``axis``: of metrics by name, or of all whose name matches ``regex``."""

    def plot(title: str, *names: str, regex: str | None = None, unit: str = "", **more: Any) -> Any:
        return wr.LinePlot(
            title=title, x=axis, y=list(names), metric_regex=regex, log_x=log, title_x=axis_title, title_y=unit, **more
        )

    return plot


over_tokens = _over(tracked.TOKENS, "tokens seen", log=False)
over_positions = _over(tracked.POSITION, "position (tokens)", log=True)
over_lengths = _over(tracked.LENGTH, "context length (tokens)", log=True)
NATS, PERCENT = "nats/token", "percent"


def _all(prefix: str, end: str = "") -> str:
    """A pattern for every metric below a prefix, or for those that end so, at whatever level."""
    return f"^{prefix}(.+/)?{end}$" if end else f"^{prefix}.+"


def _of_training() -> tuple[PanelSection, PanelSection]:
    smooth = {"smoothing_type": "average", "smoothing_factor": 10, "smoothing_show_original": True}
    training = PanelSection(
        "Training",
        "Lines are means over the seeds of a method, bands their range; with one seed the training noise is unknown.",
        [
            over_tokens("Loss", f"{TRAIN}loss", unit=NATS, **smooth),
            over_tokens("Loss by domain", regex=_all(f"{TRAIN}loss/domain/"), unit=NATS, **smooth),
            over_tokens("Loss by position in training", regex=_all(f"{TRAIN}loss/position/"), unit=NATS, **smooth),
            over_tokens("Gradient norm", f"{TRAIN}grad_norm", log_y=True),
            over_tokens("Learning rate", f"{TRAIN}learning_rate"),
            over_tokens("Refused steps", f"{TRAIN}refused_steps"),
        ],
    )
    throughput = PanelSection(
        "Throughput",
        "Work by the attention that the packed documents need.",
        [
            over_tokens("Tokens a second", f"{TRAIN}tokens_per_second"),
            over_tokens("Seconds a step by phase", regex=_all(f"{TRAIN}seconds/")),
            over_tokens("TFLOP/s a device", f"{TRAIN}tflops_per_device/documents"),
            over_tokens("Share of peak", f"{TRAIN}mfu/documents"),
            over_tokens("Peak memory of the largest process (bytes)", f"{TRAIN}peak_memory_bytes"),
            over_tokens("Work of the slowest rank over the mean", f"{TRAIN}work_imbalance"),
        ],
    )
    return training, throughput


def _of_evaluations() -> list[PanelSection]:
    """Names in between, after a run's first test-time setting, are settings."""
    short = [f"{tracked.SHORT}{task}" for task in SHORT_TASKS]
    return [
        PanelSection(
            "Loss by position",
            "Held-out documents. trained: the spectrum of training; other names: what test time adds. Differences are "
            "paired by document; their intervals are in report.html.",
            [
                over_positions("Loss by position", regex=_all(tracked.LOSS), unit=NATS),
                over_positions("Difference to the baseline", regex=_all(tracked.DIFFERENCE), unit=NATS),
                over_lengths(
                    "Loss over the second half of the context", regex=f"^{tracked.LOSS_AT_LENGTH}(/.+)?$", unit=NATS
                ),
            ],
        ),
        PanelSection(
            "Needle in a haystack",
            "Means over depths; the heat maps are among the figures.",
            [
                over_lengths("Exact match", regex=_all(tracked.NEEDLE, EXACT_MATCH), unit=PERCENT, range_y=(0, 100)),
                over_lengths("Answer-token accuracy", regex=_all(tracked.NEEDLE, TOKEN_ACCURACY), unit=PERCENT),
            ],
        ),
        PanelSection(
            "RULER",
            "The average is over the tasks of the panel beside it. Names in between are test-time settings.",
            [
                over_lengths("Average", regex=_all(tracked.RULER_SCORE, tracked.AVERAGE), unit=PERCENT),
                over_lengths("By task", regex=_all(tracked.RULER_SCORE), unit=PERCENT),
                wr.WeavePanelSummaryTable(table_name=tracked.TABLES["scores"]),
            ],
        ),
        PanelSection(
            "HELMET",
            "Each category is the mean of its tasks that were scored at every length.",
            [over_lengths("By category", regex=_all(tracked.HELMET_SCORE), unit=PERCENT)],
        ),
        PanelSection(
            "Short context",
            "What training cost; the table of scores has every task.",
            [wr.BarPlot(title="Short-context tasks", metrics=short, title_x=PERCENT)],
        ),
    ]


def _figures() -> PanelSection:
    panels: list[Any] = [
        wr.MediaBrowser(
            title=name.replace("_", " "),
            num_columns=2,
            media_keys=[f"{tracked.FIGURES}{name}{part}" for part in ("", "_2", "_3", "_4")],
        )
        for name in ("training_curves", "loss_by_position", "needle_in_a_haystack", "spectra", "what_the_spectra_do")
    ]
    panels.append(wr.WeavePanelSummaryTable(table_name=tracked.TABLES["results"]))
    return PanelSection("Figures", "Each run's own, as scripts/compare.py draws them, and its results.", panels)
