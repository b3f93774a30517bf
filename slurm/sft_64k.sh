#!/usr/bin/env bash
# Supervised fine-tuning at 64k:  sbatch slurm/sft_64k.sh from=outputs/llama3_8b_64k_cope20 [overrides]
# from= names the run to go on from, by its newest checkpoint. Its position method comes along.
# Edit these lines for your site; slurm/train_64k.sh says how else they can be given.
#SBATCH --job-name=ropewalk-sft
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
root=${DRY_RUN:+$(dirname "$0")/..} # a job is a copy in SLURM's spool, so its root is where it was submitted
cd "${root:-${SLURM_SUBMIT_DIR:?submit it: sbatch $0 (DRY_RUN=1 $0 shows it first)}}"
[ -f slurm/common.sh ] || { echo "error: submit from the root of the repository, not from $PWD" >&2; exit 2; }
. slurm/common.sh

[[ ${1-} == from=* ]] || { echo "error: say which run to go on from: sft_64k.sh from=outputs/NAME" >&2; exit 2; }
from=${1#from=}
shift
with_default +experiment=sft_64k start_from.run="$from" run_name="$(basename "$from")_sft" "$@"
train "${arguments[@]}"
