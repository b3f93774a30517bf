"""slurm/prepare_data.sh, its jobs run at once and in order by a stand-in for SLURM's sbatch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import alone_environment

from ropewalk.config import CorpusConfig, PrepareConfig
from ropewalk.data.prepare import prepare

ROOT = Path(__file__).parents[2]
SBATCH = """#!/usr/bin/env bash
# Runs what --wrap names, once for each index of --array, and prints a number as sbatch --parsable does.
set -euo pipefail
indices=x
while [ $# -gt 0 ]; do
  case $1 in
    --array=*) indices=$(seq -s ' ' $(echo "${1#--array=}" | tr - ' ')) ;;
    --dependency=*) [ -f "$JOBS/${1#--dependency=afterok:}" ] || { echo "no such job in $1" >&2; exit 1; } ;;
    --wrap) shift; wrapped=$1 ;;
    *) [[ $1 == --* ]] || { echo "unexpected $1" >&2; exit 1; } ;;
  esac
  shift
done
for index in $indices; do SLURM_ARRAY_TASK_ID=$index bash -c "$wrapped" >&2; done
number=$(($(ls "$JOBS" | wc -l) + 1))
touch "$JOBS/$number"
echo "$number"
"""


@pytest.mark.slow
def test_the_array_gives_the_bytes_of_one_process(fixture_corpus, fixture_tokenizer, tmp_path):
    """A name with a space and a quote reaches the jobs as it is."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "jobs").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    odd = tmp_path / "it's text"
    odd.symlink_to(fixture_corpus)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**alone_environment(), "PATH": path, "JOBS": str(tmp_path / "jobs")}
    settings = ["+corpus=files", f'corpus.paths=["{odd}"]', f"corpus.tokenizer={fixture_tokenizer}", "shard_mb=0.05"]
    command = ["slurm/prepare_data.sh", "2", *settings, "sequence_lengths=[64]", f"output={tmp_path}/array"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "plan 1, tokenize 2, pack 3, finish 4\n"
    corpus = CorpusConfig(name="files", paths=[str(odd)], tokenizer=str(fixture_tokenizer))
    prepare(PrepareConfig(str(tmp_path / "one"), [64], shard_mb=0.05, workers=1, corpus=corpus), lambda line: None)
    found = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "array", tmp_path / "one")
    ]
    assert found[0] == found[1]
