"""Numbers of the recipe: ``python recipes/smollm2_135m_cpu/table.py EVALUATION...``, RoPE's first.

Writes expected.csv from the evaluations' tables, and prints the README's table: loss by position with its interval over
documents, and the difference to the first, paired by document.
"""

import sys
from pathlib import Path

import pandas as pd

from ropewalk.evaluation.bootstrap import paired_difference
from ropewalk.evaluation.results import read_document_losses, read_results

STRETCHES = ((1024, 2048), (6144, 8192), (8192, 10240), (10240, 12288))  # buckets of positions, the second excluded
FACTS = {
    "source": "this repository, two CPU cores, zero-shot, eight documents", "table": "README", "model": "SmolLM2-135M",
}  # fmt: skip


def main(directories: list[Path]) -> None:
    """Write and print what the evaluations in ``directories`` hold."""
    rows, lines = [], []
    first = read_document_losses(directories[0])
    for directory in directories:
        table = read_results(directory)
        run = str(table["run"].iloc[0])
        cells = []
        differences = paired_difference(read_document_losses(directory), first)
        for start, end in STRETCHES:
            loss = _row(table[table["task"] == "loss_by_position"], start, end)
            cell = f"{loss['value']:.3f} [{loss['ci_low']:.2f}, {loss['ci_high']:.2f}]"
            if directory != directories[0]:
                paired = _row(differences, start, end)
                cell += f"; {paired['value']:+.3f} [{paired['ci_low']:+.3f}, {paired['ci_high']:+.3f}]"
            cells.append(cell)
            benchmark = f"loss over positions {start}-{end}"
            rows.append(FACTS | {"benchmark": benchmark, "method": run, "run": run, "task": "nll",
                                 "context_length": end, "value": f"{loss['value']:.3f}"})  # fmt: skip
        lines.append(f"| {run} | {' | '.join(cells)} |")
    columns = ["source", "table", "benchmark", "model", "method", "run", "task", "context_length", "value"]
    pd.DataFrame(rows)[columns].to_csv(Path(__file__).with_name("expected.csv"), index=False)
    heads = [f"{start:,}-{end:,}" for start, end in STRETCHES]
    print("\n".join([f"| run | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|", *lines]))


def _row(table: pd.DataFrame, start: int, end: int) -> pd.Series:
    return table[(table["position_start"] == start) & (table["position_end"] == end)].iloc[0]


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
