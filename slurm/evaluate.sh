#!/usr/bin/env bash
# One run's evaluation on one GPU; with --ntasks=8 --gpus-per-node=8 eight processes share its samples:
#   sbatch slurm/evaluate.sh checkpoint=outputs/NAME output=outputs/NAME/evaluation documents=DIR [overrides]
# A run that is not exported yet is exported first; a finished evaluation is kept. Near the time limit it is ended and put
# back into the queue, where it goes on from the parts that are measured.
# Edit these lines for your site.
#SBATCH --job-name=ropewalk-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit it: sbatch $0}" # SLURM runs a copy of this file from its spool
[ -f slurm/common.sh ] || { echo "error: submit from the root of the repository, not from $PWD" >&2; exit 2; }
. slurm/common.sh

alone evaluate scripts/evaluate.py "$@"
