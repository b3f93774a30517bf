#!/usr/bin/env bash
# Runs to one report:  sbatch slurm/compare.sh 'runs=[outputs/a,outputs/b]' [baseline=a] [output=report.html]
# Edit these lines for your site.
#SBATCH --job-name=ropewalk-compare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=1:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit it: sbatch $0}" # SLURM runs a copy of this file from its spool
[ -f slurm/common.sh ] || { echo "error: submit from the root of the repository, not from $PWD" >&2; exit 2; }
. slurm/common.sh

alone compare scripts/compare.py "$@"
