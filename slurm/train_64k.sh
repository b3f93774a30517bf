#!/usr/bin/env bash
# Llama-3-8B to 64k:  sbatch slurm/train_64k.sh [+experiment=rope] [overrides]      (default: CoPE-20)
# Edit these lines for your site. sbatch takes them on its command line too, and
# $(python scripts/job.py options cluster=NAME nodes=N) makes them of a file in configs/cluster/.
#SBATCH --job-name=ropewalk-64k
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
root=${DRY_RUN:+$(dirname "$0")/..} # a job is a copy in SLURM's spool, so its root is where it was submitted
cd "${root:-${SLURM_SUBMIT_DIR:?submit it: sbatch $0 (DRY_RUN=1 $0 shows it first)}}"
[ -f slurm/common.sh ] || { echo "error: submit from the root of the repository, not from $PWD" >&2; exit 2; }
. slurm/common.sh

with_default +experiment=cope20 "$@"
train "${arguments[@]}"
