#!/usr/bin/env bash
# From 64k to 512k, eight GPUs to a sequence:  sbatch slurm/train_512k.sh [+experiment=...] [overrides]
# It goes on from the export of a 64k run: model.path=outputs/llama3_8b_64k_cope20/export is the default experiment's.
# Edit these lines for your site; slurm/train_64k.sh says how else they can be given.
#SBATCH --job-name=ropewalk-512k
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit it: sbatch $0}" # SLURM runs a copy of this file from its spool
[ -f slurm/common.sh ] || { echo "error: submit from the root of the repository, not from $PWD" >&2; exit 2; }
. slurm/common.sh

with_default +experiment=cope20_512k "$@"
train "${arguments[@]}"
