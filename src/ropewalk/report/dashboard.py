"""The W&B workspace and report of a project: ``python scripts/dashboard.py project=...``.

wandb-workspaces has no public way to see what it would send, so :func:`built` calls its private ``_to_model``; the
version is pinned for that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ropewalk.config.evaluation import DashboardConfig
from ropewalk.errors import UserError
from ropewalk.files import write_atomically

METHOD = "rope.name"  # of a run's configuration
# Configuration columns of the table of runs; the first part is the key that runs log, so ".value" follows it.
COLUMNS = (
    METHOD, "run.chain", "run.trained_length", "model.name", "data.sequence_length", "trainer.seed",
    "trainer.max_steps", "trainer.learning_rate", "trainer.global_batch_size", "run.parameters", "run.git_commit",
)  # fmt: skip
PUSHED = "pushed.json"  # what to update the next time


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
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed, which builds W&B dashboards; pip install 'ropewalk[dashboard]'"
        ) from error
    from ropewalk.report.panels import fixed_id, sections

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
        blocks=[block for section in sections() for block in _blocks(section, wr)],
        width="fluid",
    )
    return workspace, report


def _blocks(section: Any, wr: Any) -> list[Any]:
    """Heading, reading and grid of a section of the report; the runs are those of the report's own project."""
    from ropewalk.report.panels import fixed_id

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
    known = json.loads(pushed.read_text()) if pushed.is_file() else {}
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
