#!/usr/bin/env bash
# From 64k to 512k, eight GPUs to a sequence:  sbatch slurm/train_512k.sh [+experiment=...] [overrides]
# It goes on from the 64k run that start_from.run names; the default experiment is ProLong's second stage.
# Edit these lines for your site; slurm/train_64k.sh says how else they can be given.
#SBATCH --job-name=ropewalk-512k
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
root=${DRY_RUN:+$(dirname "$0")/..} # a job is a copy in SLURM's spool, so its root is where it was submitted
cd "${root:-${SLURM_SUBMIT_DIR:?submit it: sbatch $0 (DRY_RUN=1 $0 shows it first)}}"
[ -f slurm/common.sh ] || { echo "error: submit from the root of the repository, not from $PWD" >&2; exit 2; }
. slurm/common.sh

with_default +experiment=prolong_512k "$@"
train "${arguments[@]}"
