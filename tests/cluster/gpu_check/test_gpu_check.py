"""The GPU check runs whole on a CPU, loses one part where one is killed, and fills a page from what it has written."""

import json
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch
from helpers import PYTHONPATH, ROOT, alone_environment
from torch.nn.attention import varlen

from ropewalk.cluster.gpu_check import check_runner, engine_parts, kernel_parts
from ropewalk.cluster.gpu_check.check_runner import (
    BEGIN,
    END,
    LIMITS,
    RANK_LIMITS,
    fill_page,
    part_environment,
    run_part,
)
from ropewalk.errors import UserError
from ropewalk.model.attention import Documents, attend, load_kernel

CPU = torch.device("cpu")


def values(part):
    module = kernel_parts if hasattr(kernel_parts, part) else engine_parts
    return dict(getattr(module, part)(CPU, True))


def test_eight_minutes_for_one_gpu():
    assert sum(LIMITS.values()) <= 8 * 60 + 30
    assert sum(RANK_LIMITS.values()) <= 10 * 60
    page = (ROOT / "docs" / "performance.md").read_text()
    assert {name: int(limit) for name, limit in re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE)} == LIMITS


def test_parts_without_an_engine():
    found = values("machine")
    assert found["kernels"] == [{"kernel": "auto", "found": f"sdpa (torch {torch.__version__})"}]
    assert "enable_gqa" in found["varlen_attn"].split(", ")
    assert found["versions"]["torch"] == torch.__version__
    tables = values("rotary")["tables"]
    assert [row["arm"] for row in tables] == list(kernel_parts.ARMS)
    for row in tables:
        assert row["from the CPU's"] == 0  # it is the CPU
        assert 0 < row["from float64, radians"] <= 524_288 * 2**-24  # half a step of float32 at the last position
    rows = values("attention")["kernels"]
    assert [row["documents"] for row in rows] == ["one", "halves", "short"]
    assert [row["from float32's"] for row in rows] == [0, 0, 0]
    assert all(row["both in one order, ms"] > 0 and "error" not in row for row in rows)
    loss = values("loss")
    assert [row["chunk"] for row in loss["chunks"]] == [64, 128]
    assert all(row["ms"] > 0 for row in loss["products"])
    assert len(loss["products"]) == 2


@pytest.mark.slow
def test_parts_that_train():
    found = values("step")
    rows = {(row["setting"], row["layers"]): row for row in found["steps"]}
    assert list(rows) == [("plain", 1), ("plain", 2), ("offload", 1), ("tiled", 1), ("attention kept", 1)]
    assert rows["offload", 1]["losses"] == rows["attention kept", 1]["losses"] == rows["plain", 1]["losses"]
    assert rows["tiled", 1]["losses"] == pytest.approx(rows["plain", 1]["losses"], rel=1e-6)
    assert all(row["losses"][-1] < row["losses"][0] and row["planned, GiB"] > 0 for row in rows.values())
    assert len(values("profile")["kernels"]) == engine_parts.LARGEST
    alone = values("data_parallel")  # one rank is a group, too, and its share of a row is all of it
    assert alone["ranks"] == 1
    assert alone["steps"][0]["losses"] == values("shared_rows")["steps"][0]["losses"] == rows["plain", 2]["losses"]
    resumed = values("resume")
    assert resumed["largest difference, as saved"] == 0
    assert resumed["largest difference, under ZeRO-1"] < 1e-5 * min(resumed["losses"])


@pytest.mark.slow
def test_a_part_is_a_process_and_a_line(tmp_path):
    """As a user calls it: what the output holds already stays."""
    output = tmp_path / "results" / "gpu_check.jsonl"
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--small", "--output", str(output)]
    output.parent.mkdir()
    output.write_text('{"part": "an earlier one"}\n')
    done = subprocess.run([*command, "--parts", "machine"], capture_output=True, text=True, check=False,
                          env={**alone_environment(), "PYTHONPATH": PYTHONPATH})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    _, entry = map(json.loads, output.read_text().splitlines())
    assert (entry["part"], entry["versions"]["torch"]) == ("machine", torch.__version__)
    assert "error" not in entry


REPORT = """<testsuites><testsuite><testcase name="a" time="1"/><testcase name="b"><skipped message="no"/></testcase>
<testcase name="c"><failure message="m">Traceback: it broke</failure></testcase>
<testcase name="d"><error message="m">later</error></testcase></testsuite></testsuites>"""


def test_results_of_tests_are_read_by_name(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    found = dict(engine_parts.outcomes(tmp_path / "report.xml"))
    results = {row["test"]: row["result"] for row in found["results"]}
    assert results == {"a": "passed", "b": "skipped", "c": "failure", "d": "error"}
    assert found["first_traceback"] == "Traceback: it broke"


def test_every_test_marked_gpu_is_run():
    mark = "@pytest.mark." + "gpu\n"
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if mark in path.read_text()]
    assert len(marked) > 5
    assert not [path for path in marked if not any(path.is_relative_to(ROOT / run) for run in engine_parts.TESTS)]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """``script(CODE)``: what stands for scripts/gpu_check.py in the parts' processes."""

    def write(code):
        path = tmp_path / "part.py"
        path.write_text(code)
        monkeypatch.setattr(check_runner, "SCRIPT", path)

    return write


def test_a_part_past_its_limit_keeps_what_it_has_said(script):
    """Its own children end with it."""
    script(
        "import subprocess, sys, time\n"
        'print(\'noise\\ngpu_check {"a": 1}\\ngpu_check {"b": [2]}\', flush=True)\n'
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"  # holds the pipe
        "time.sleep(600)"
    )
    entry = run_part("machine", [], 3.0, {})
    assert (entry["a"], entry["b"], entry["error"]) == (1, [2], "ended by its limit of 3 s")


def test_a_part_that_fails_keeps_its_words_and_when_it_was_gone(script):
    script("import time\nprint('gpu_check {\"raised_at\": %f}' % time.time(), flush=True)\nraise ValueError('no room')")
    entry = run_part("exit", ["--device", "cpu"], 60.0, {})
    assert entry["error"].startswith("exit code 1: ")
    assert entry["error"].rstrip().endswith("ValueError: no room")
    assert 0 <= entry["seconds_to_end"] < 30
    assert "raised_at" not in entry


def test_ranks_of_each_part_meet_by_themselves():
    """Not at torchrun's agent, whose store would have the next part wait for the keys of the last."""
    given = {"RANK": "1", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True", "PYTORCH_ALLOC_CONF": "x"}
    own = [part_environment(given, number) for number in range(2)]
    assert [environment["MASTER_PORT"] for environment in own] == ["29501", "29502"]
    assert not any(name.startswith("TORCHELASTIC") for name in own[0])
    assert (own[0]["RANK"], own[0]["PYTORCH_ALLOC_CONF"]) == ("1", "x")
    assert "MASTER_PORT" not in part_environment({}, 0)


@pytest.mark.slow
def test_a_rank_that_raises_is_gone_while_the_other_waits():
    """Two ranks over gloo, as torchrun would have them; the other one hears of it from its broken connection."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": PYTHONPATH}

    def start(rank):
        environment = {**alone_environment(), **group, "RANK": rank, "LOCAL_RANK": rank}
        return run_part("exit", ["--device", "cpu", "--small"], RANK_LIMITS["exit"], environment)

    with ThreadPoolExecutor(2) as pool:
        waiting, raised = pool.map(start, "01")
    assert "MemoryError: as if this rank had no memory left" in raised["error"]
    assert raised["seconds_to_end"] < 60
    assert "seconds_to_end" not in waiting


PAGE = f"# Performance\n\nBefore.\n\n{BEGIN}\nNo GPU yet.\n{END}\n\n## After\n"
ENTRIES = [
    {"part": "machine", "seconds": 3.25, "driver": "580.1"},
    {"part": "loss", "seconds": 1.0, "chunks": [{"chunk": 1024, "ms": 1.23456}, {"chunk": 2048, "peak, GiB": 0.5}],
     "error": "a | b\nc"},
]  # fmt: skip


def test_a_page_is_filled_and_filled_again(tmp_path):
    page, results = tmp_path / "page.md", tmp_path / "gpu_check.jsonl"
    page.write_text(PAGE)
    results.write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    for _ in range(2):
        fill_page(results, page)
        text = page.read_text()
        assert text.startswith(f"# Performance\n\nBefore.\n\n{BEGIN}\n")
        assert text.endswith(f"{END}\n\n## After\n")
        assert "No GPU yet." not in text
        assert text.count("### machine") == text.count("### loss") == 1
    assert "| driver | 580.1 |" in text
    assert "| error | a \\| b c |" in text
    assert "| chunk | ms | peak, GiB |\n|---|---|---|\n| 1024 | 1.235 |  |\n| 2048 |  | 0.5 |" in text


@pytest.mark.parametrize(("page", "results"), [("no marks", json.dumps(ENTRIES[0])), (PAGE, "")])
def test_a_page_without_marks_or_results_is_left_alone(tmp_path, page, results):
    (tmp_path / "page.md").write_text(page)
    (tmp_path / "results").write_text(results)
    with pytest.raises(UserError, match=r"must have entries, and .* the lines"):
        fill_page(tmp_path / "results", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == page


def test_the_performance_page_has_the_marks(tmp_path):
    text = (ROOT / "docs" / "performance.md").read_text()
    assert text.index(BEGIN) < text.index(END)


def test_an_older_torchs_attention_takes_the_call(monkeypatch):
    """With neither ``window_size`` nor ``enable_gqa``, as an earlier version had it: heads repeated, causal by name."""

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
        assert query.shape[1] == key.shape[1] == value.shape[1]
        assert is_causal
        return load_kernel("sdpa").call(query, key, value, cu_seqlens_q=cu_seq_q, softmax_scale=scale, causal=is_causal)

    monkeypatch.setattr(varlen, "varlen_attn", kernel_parts.adapted(older))
    q, k, v = (torch.randn(1, heads, 100, 16) for heads in (4, 2, 2))
    documents = Documents.from_cu_seqlens(torch.tensor([0, 37, 100]), CPU)
    out, exact = (attend(load_kernel(name), q, k, v, 0.3, documents) for name in ("torch", "sdpa"))
    torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-6)
    same = kernel_parts.adapted(lambda query, key, value, *, scale=None, window_size=(-1, -1), enable_gqa=False: key)
    assert same(q, k, v, scale=1.0, window_size=(-1, 0), enable_gqa=True) is k
