"""The W&B workspace and report: their JSON against golden files, and against what runs log.

golden/*.json were written by ``python scripts/dashboard.py project=ropewalk output=tests/report/golden`` with
wandb-workspaces 0.4.13, and read through once by eye. No server has seen them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import alone_environment
from report.fake_runs import FakeRun, benchmark_row, write_run, write_table

from ropewalk.config.evaluation import DashboardConfig
from ropewalk.report import tracked
from ropewalk.report.dashboard import COLUMNS, dashboard
from ropewalk.report.runs import load_run
from ropewalk.training.meter import CONVENTIONS, PHASES

GOLDEN = Path(__file__).parent / "golden"
# Beside what Meter.row and the logger's rows of every run hold.
TRAINED = [
    *(f"train/{name}" for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "refused_steps")),
    *(f"train/{name}" for name in ("work_imbalance", "peak_memory_bytes", "loss/domain/long", "loss/position/16")),
    *(f"train/seconds/{phase}" for phase in PHASES),
    *(f"train/{rate}/{name}" for rate in ("tflops_per_device", "mfu") for name in CONVENTIONS),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    files = dashboard(DashboardConfig(project="ropewalk", output=str(tmp_path_factory.mktemp("dashboard"))))
    return {path.name: path.read_text() for path in files}


@pytest.fixture(scope="module")
def workspace(written: dict[str, str]) -> dict[str, Any]:
    return json.loads(written["workspace.json"])


@pytest.mark.parametrize("name", ["workspace.json", "report.json"])
def test_json_is_the_golden_one(written: dict[str, str], name: str) -> None:
    assert written[name] == (GOLDEN / name).read_text()


def test_runs_are_grouped_by_method_and_show_their_configuration(workspace: dict[str, Any]) -> None:
    (runs,) = workspace["spec"]["section"]["runSets"]
    # W&B keeps a nested configuration as {rope: {value: {name: ...}}}
    assert runs["grouping"] == [{"section": "config", "name": "rope.value.name"}]
    shown = {name for name, visible in runs["runFeed"]["columnVisible"].items() if visible}
    assert shown == {"run:displayName", *(f"config:{name.replace('.', '.value.', 1)}" for name in COLUMNS)}


def test_the_library_reads_its_own_json_back(written: dict[str, str]) -> None:
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.reports.v2.internal import ReportViewspec
    from wandb_workspaces.workspaces.internal import View

    read = ws.Workspace._from_model(View.model_validate_json(written["workspace.json"]))
    names = [section.name for section in read.sections]
    assert names[:4] == ["Training", "Loss by position", "Needle in a haystack", "RULER"]
    report = Report._from_model(ReportViewspec.model_validate_json(written["report.json"]))
    grids = [block for block in report.blocks if type(block).__name__ == "PanelGrid"]
    assert [grid.runsets[0].groupby for grid in grids] == [["config.rope.value.name"]] * len(read.sections)
    # an intention of ours, and the library's way of saying it, are two things: panels arrive as they were meant
    assert [len(grid.panels) for grid in grids] == [len(section.panels) for section in read.sections]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of everything that a run with every kind of evaluation logs."""
    root = tmp_path_factory.mktemp("runs")
    baseline = load_run(write_run(root / "a", FakeRun("a")))
    directory = write_run(root / "b", FakeRun("b", offset=0.1))
    rows = [benchmark_row("b", "ruler", task, length, 50) for task in ("vt", "cwe") for length in (2048, 4096)]
    rows += [benchmark_row("b", "helmet", "json_kv", 4096, 50, category="recall")]
    rows += [benchmark_row("b", "lm-eval", "mmlu", None, 60, metric="acc")]
    write_table(directory / "evaluation", rows)
    run = load_run(directory)
    names = {name for row in tracked.history_of(run, baseline) for name in row}
    return names | set(tracked.summary_of(run)) | set(TRAINED) | {tracked.TOKENS}


def panels_of(workspace: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for one in workspace["spec"]["section"]["panelBankConfig"]["sections"] for panel in one["panels"]]


def test_every_line_plot_finds_what_runs_log(workspace: dict[str, Any], logged: set[str]) -> None:
    plots = [panel["config"] for panel in panels_of(workspace) if panel["viewType"] == "Run History Line Plot"]
    assert len(plots) >= 18
    for plot in plots:
        assert plot["xAxis"] in logged, plot["chartTitle"]
        regex = plot.get("metricRegex")
        found = [name for name in logged if re.search(regex, name)] if regex else plot["metrics"]
        assert found, plot["chartTitle"]
        assert set(found) <= logged, plot["chartTitle"]


def test_every_evaluated_metric_has_a_panel_over_its_axis(workspace: dict[str, Any], logged: set[str]) -> None:
    plots = [panel["config"] for panel in panels_of(workspace) if panel["viewType"] == "Run History Line Plot"]
    bars = [name for panel in panels_of(workspace) for name in panel["config"].get("metrics", [])]
    axes = {pattern: axis for axis, patterns in tracked.AXES.items() for pattern in patterns}
    for name in logged:
        if not name.startswith("eval/") or name in tracked.AXES:
            continue
        axis = next((axes[p] for p in axes if re.fullmatch(p.replace("*", ".+"), name)), None)
        over = {p["xAxis"] for p in plots if name in p["metrics"] or re.search(p.get("metricRegex", "$^"), name)}
        assert over == {axis} if axis else any(bar.endswith(name) for bar in bars), name


@pytest.mark.slow
def test_push_without_an_account_says_so_after_writing_the_files(tmp_path: Path) -> None:
    environment = alone_environment() | {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    environment |= {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB__DISABLE_STATS": "true",
        "NETRC": str(tmp_path / "none"),
    }
    done = subprocess.run(
        [sys.executable, "scripts/dashboard.py", "project=p", f"output={tmp_path / 'out'}", "--push"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "error: push=true: W&B did not take the dashboard" in done.stderr
    assert (tmp_path / "out" / "workspace.json").is_file()


class GraphQL(BaseHTTPRequestHandler):
    """A server that answers W&B's client well enough for it to save views, and keeps what it was sent."""

    received: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(body)
        reply = json.dumps({"data": self.answer(body["query"], body.get("variables") or {})}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "ropewalk", "entityName": "me", "createdAt": "", "isBenchmark": False}
        viewer = {"id": "1", "username": "me", "name": "me", "entity": "me", "email": "", "admin": False, "flags": "{}"}
        viewer |= {"teams": {"edges": []}, "apiKeys": {"edges": []}, "deletedAt": None}
        if "upsertView" in query:
            view = {"id": variables.get("id") or f"id{len(self.received)}", "name": variables.get("name")}
            times = {"createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00"}
            more = {"displayName": "d", "description": "", "project": project, "user": viewer, **times}
            return {
                "upsertView": {"view": {**more, **view, "spec": variables["spec"], "type": "runs"}, "inserted": True}
            }
        if "models" in query:
            edges = [{"node": project | {"user": viewer}, "cursor": ""}]
            return {"models": {"edges": edges, "pageInfo": {"endCursor": "", "hasNextPage": False}}}
        return {"viewer": viewer, "serverInfo": None, "QueryType": None}

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Any:
    handler = type("Handler", (GraphQL,), {"received": []})
    running = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running, handler.received
    running.shutdown()
    thread.join()


def pushed(server: HTTPServer, output: Path, home: Path) -> subprocess.CompletedProcess[str]:
    environment = alone_environment() | {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "HOME": str(home)}
    environment |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_ERROR_REPORTING": "false"}
    command = [sys.executable, "scripts/dashboard.py", "project=ropewalk", f"output={output}", "push=true"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_push_sends_the_written_json_and_updates_what_an_earlier_push_made(server: Any, tmp_path: Path) -> None:
    running, received = server
    known = {"place": "me/ropewalk", "workspace": ["nw-earlier-v", "w1"]}  # the report was never saved
    (tmp_path / "pushed.json").write_text(json.dumps(known))
    done = pushed(running, tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr
    workspace, report = (body["variables"] for body in received if "upsertView" in body["query"])
    assert (workspace["type"], workspace["id"], workspace["name"]) == ("project-view", "w1", "nw-earlier-v")
    assert report["type"] == "runs"
    assert not report["id"]
    for sent, name in ((workspace, "workspace"), (report, "report")):
        assert (sent["entityName"], sent["projectName"]) == ("me", "ropewalk")
        assert json.loads(sent["spec"]) == json.loads((GOLDEN / f"{name}.json").read_text())["spec"]
    saved = json.loads((tmp_path / "pushed.json").read_text())
    assert saved["workspace"] == ["nw-earlier-v", "w1"]
    assert saved["report"].startswith("id")
