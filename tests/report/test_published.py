"""Published numbers beside those of made-up runs, against values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from report.fake_runs import FakeRun, benchmark_row, bucket_loss, write_run, write_table

from ropewalk.evaluation.paper import read_published
from ropewalk.report.published import published_section
from ropewalk.report.runs import Run, load_run
from ropewalk.report.section import Block, Cell, Section

HEADER = "source,table,benchmark,method,run,task,context_length,value\n"


def published(tmp_path: Path, *lines: str) -> pd.DataFrame:
    path = tmp_path / "expected.csv"
    path.write_text(HEADER + "\n".join(lines) + "\n")
    return read_published(path)


def run_of(root: Path, name: str, *rows: dict, **fake: object) -> Run:
    directory = write_run(root / name, FakeRun(name, **fake))
    if rows:
        write_table(directory / "evaluation", [row | {"run": name} for row in rows])
    return load_run(directory)


def niah(length: int, *values: float, **more: object) -> list[dict]:
    names = [f"niah_single_{number}" for number in range(1, len(values) + 1)]
    found = zip(names, values, strict=True)
    return [benchmark_row("", "ruler", n, length, v, metric="string_match_all", **more) for n, v in found]


def cells(block: Block) -> dict[str, list[Cell]]:
    return dict(block.rows)


def test_a_score_stands_with_the_published_one_and_is_marked_past_two_errors(tmp_path: Path) -> None:
    """Three tasks with an error of 1 each: their mean's is 1 / sqrt(3), and 1.2 is just past twice that, 1.1 is not."""
    run = run_of(tmp_path, "cope20", *niah(1024, 90, 90, 90), *niah(2048, 80, 80, 80), *niah(4096, 70, 70, 70))
    rows = published(tmp_path, "Paper,1,RULER,cope20,,NIAH,1024,91.2", "Paper,1,RULER,cope20,,NIAH,2048,78.9",
                     "Paper,1,RULER,cope20,,NIAH,4096,68.8")  # fmt: skip
    found = published_section([run], rows)
    (block,) = found.blocks
    assert (block.title, found.columns) == ("RULER: Paper, table 1", ["1,024", "2,048", "4,096"])
    (low, within, above) = cells(block)["NIAH: cope20"]
    assert (low.main, low.detail) == ("90.0", "± 0.6 (published 91.2, -1.2)")
    assert [cell.marked for cell in (low, within, above)] == [True, False, True]
    assert [cell.beyond for cell in (low, within, above)] == [False, False, True]
    assert found.missing == []


def test_a_file_without_a_number_has_no_section(tmp_path: Path) -> None:
    assert published_section([run_of(tmp_path, "a", *niah(1024, 50, 50, 50))], published(tmp_path)) is None


def test_a_run_is_found_by_the_end_of_its_name_and_under_each_test_time_setting(tmp_path: Path) -> None:
    run = run_of(tmp_path, "a", *niah(1024, 50, 50, 50))
    setting = replace(run, name="study/a, auto", test_time="auto", settings={"auto": run})
    rows = published(tmp_path, "Paper,1,RULER,other,a,NIAH,1024,55")
    (block,) = published_section([setting], rows).blocks
    assert cells(block)["NIAH: study/a, auto"][0].main == "50.0"


def test_a_row_that_names_a_run_is_that_runs_alone(tmp_path: Path) -> None:
    a, b = (run_of(tmp_path, name, *niah(1024, value, value, value)) for name, value in (("a", 50), ("b", 60)))
    rows = published(tmp_path, "Paper,1,RULER,a,b,NIAH,1024,55")
    (block,) = published_section([a, b], rows).blocks
    assert {name: [cell.main for cell in row] for name, row in block.rows} == {"NIAH: b": ["60.0"]}


def test_each_scaling_is_a_row(tmp_path: Path) -> None:
    run = run_of(tmp_path, "a", *niah(4096, 10, 10, 10), *niah(4096, 30, 30, 30, test_time_scaling="yarn(factor=4)"))
    (block,) = published_section([run], published(tmp_path, "Paper,1,RULER,a,,NIAH,4096,20")).blocks
    assert {name: row[0].main for name, row in block.rows} == {"NIAH: a": "10.0", "NIAH: a, yarn(factor=4)": "30.0"}


def test_losses_are_the_evaluations(tmp_path: Path) -> None:
    """Over the second half, and over a stretch that is made of two buckets."""
    fake = FakeRun("a")
    run = run_of(tmp_path, "a")
    rows = published(
        tmp_path, "Here,README,loss over the second half,a,,nll,1024,2.000",
        "Here,README,loss over positions 128-512,a,,nll,2048,2.000",
        "Here,README,loss over positions 100-512,a,,nll,2048,2.000",
    )  # fmt: skip
    found = published_section([run], rows)
    values = [cell.main for block in found.blocks for _, row in block.rows for cell in row if cell.main != "-"]
    assert values == [f"{bucket_loss(fake, 512, 1024):.3f}", f"{bucket_loss(fake, 128, 512):.3f}"]
    assert found.blocks[0].title == "loss over the second half: Here, README"
    assert found.missing == ["Published and not measured in these runs: 1 of loss over positions 100-512 (a)."]


def test_what_training_took_is_read_from_its_metrics(tmp_path: Path) -> None:
    """44 steps of 8,192 tokens at 5,001 to 5,044 tokens/s: the median is 5,022.5. What is more than a tenth apart is
    marked."""
    run = run_of(tmp_path, "a")
    lines = [f"Plan,,training,a,,{task},2048,{value}" for task, value in
             (("tokens/s a GPU", 5000), ("GPU-hours", 1), ("GiB a GPU", 2))]  # fmt: skip
    (block,) = published_section([run], published(tmp_path, *lines)).blocks
    found = {name: row[0] for name, row in block.rows}
    assert found["tokens/s a GPU: a"].main == f"{5022.5:,.0f}"
    assert found["tokens/s a GPU: a"].detail == f"(published 5,000, {22.5:+,.0f})"
    assert found["GPU-hours: a"].detail == f"(published 1, {360448 / 5022.5 / 3600 - 1:+,.0f})"
    assert found["GiB a GPU: a"].main == "1.0"
    marks = {name: cell.marked for name, cell in found.items()}
    assert marks == {"tokens/s a GPU: a": False, "GPU-hours: a": True, "GiB a GPU: a": True}
    other = published_section([run], published(tmp_path, "Plan,,training,a,,GPU-hours,65536,1"))
    assert other.blocks == []  # of another length


def test_what_has_no_error_is_marked_past_a_stated_difference(tmp_path: Path) -> None:
    """A loss past 0.05 nats, a score past two points, a speed past a tenth; the legend states the three."""
    fake = FakeRun("a")
    loss = bucket_loss(fake, 512, 1024)
    run = run_of(tmp_path, "a", *niah(1024, 50, 50, 50, stderr=math.nan))
    for value, mark in ((loss + 0.04, False), (loss + 0.06, True), (loss - 0.06, True)):
        rows = published(tmp_path, f"Here,README,loss over the second half,a,,nll,1024,{value:.3f}")
        (cell,) = marked(published_section([run], rows))
        assert cell.marked == mark
    for value, mark in ((51.9, False), (52.1, True), (47.9, True)):
        found = published_section([run], published(tmp_path, f"Paper,1,RULER,a,,NIAH,1024,{value}"))
        (cell,) = marked(found)
        assert cell.marked == mark
    assert "more than 0.05 nats, 2 points or, of training, 10%" in found.legend
    for value, mark in ((5500, False), (5600, True)):  # of 5,022.5
        rows = published(tmp_path, f"Plan,,training,a,,tokens/s a GPU,2048,{value}")
        (cell,) = marked(published_section([run], rows))
        assert cell.marked == mark


def marked(table: Section) -> list[Cell]:
    return [cell for block in table.blocks for _, row in block.rows for cell in row if cell.main != "-"]


def test_what_was_not_measured_is_counted(tmp_path: Path) -> None:
    """A mean that lacks a task is none."""
    run = run_of(tmp_path, "a", *niah(1024, 50, 50))
    rows = published(tmp_path, "Paper,1,RULER,a,,NIAH,1024,55", "Paper,1,RULER,b,,NIAH,1024,55",
                     "Paper,1,RULER,b,,MK,1024,55")  # fmt: skip
    found = published_section([run], rows)
    assert found.blocks == []
    assert found.missing == [
        "Published and not measured in these runs: 1 of RULER (a).",
        "Published and of no run of this report: 2 of RULER (b).",
    ]


def test_a_name_with_a_comma_must_be_quoted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"suite\.published=.*is not a table: .*saw 9"):
        published(tmp_path, "Paper,1,RULER,a,,NIAH,1024,55", "Paper,1,RULER,a,,NIAH, x=1,1024,55")
    with pytest.raises(ValueError, match="context_length must be whole numbers"):
        published(tmp_path, "Paper,1,RULER,a,,NIAH,long,55")


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("recipes/*/expected*.csv")), ids=str)
def test_the_recipes_tables_are_read(path: Path) -> None:
    rows = read_published(path)
    assert rows["value"].notna().all()
    lengths = rows["context_length"].dropna()
    assert ((lengths >= 128) & (lengths <= 524288)).all()  # from the demo to ProLong
    assert not math.isnan(rows["value"].sum())
