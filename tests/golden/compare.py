"""Does a run's loss curve follow a golden one, and if not, from which step on?

python tests/golden/compare.py tests/golden/demo.json EXPERIMENT RANKS RUN_DIRECTORY
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ropewalk.runs.metrics_file import read_metrics

TOLERANCE = 1e-4  # nats per token; README.md says why


def first_difference(golden: Sequence[float], found: Sequence[float], tolerance: float = TOLERANCE) -> str | None:
    """In words, the first step (from 1) at which a curve leaves the golden one; None where it follows to its end."""
    for step, (expected, loss) in enumerate(zip(golden, found, strict=False), 1):
        if not abs(loss - expected) <= tolerance:  # so that nan differs
            before = max((abs(a - b) for a, b in zip(golden[: step - 1], found, strict=False)), default=0.0)
            agreed = f"; the steps before agree within {before:.1e}" if step > 1 else ""
            return f"step {step} first differs: golden {expected:.7f}, found {loss:.7f} (allowed {tolerance:g}){agreed}"
    if len(found) < len(golden):
        return f"the run ends after step {len(found)}, the golden curve has {len(golden)}"
    return None


def main(golden: str, experiment: str, ranks: str, run_dir: str) -> int:
    """Print where the curves part; exit code 1 where they do."""
    expected = json.loads(Path(golden).read_text())["losses"][experiment][ranks]
    found = [row["loss"] for row in read_metrics(Path(run_dir))]
    told = first_difference(expected, found)
    print(f"{experiment} on {ranks} ranks: {told or f'{len(expected)} steps agree within {TOLERANCE:g}'}")
    return 1 if told else 0


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
