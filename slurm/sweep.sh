#!/usr/bin/env bash
# Arms that differ in one thing, as one array:  sbatch slurm/sweep.sh [ARM ...] [overrides for all]
# The default arms are RoPE, HardClip-20 and CoPE-20 on Llama-3-8B at 64k; others are experiments by name, with
# --array=0-N for N+1 of them. A sweep over numbers is hydra/launcher=slurm's work (docs/slurm.md).
# Edit these lines for your site; slurm/train_64k.sh says how else they can be given.
#SBATCH --job-name=ropewalk-sweep
#SBATCH --array=0-2
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -euo pipefail
root=${DRY_RUN:+$(dirname "$0")/..} # a job is a copy in SLURM's spool, so its root is where it was submitted
cd "${root:-${SLURM_SUBMIT_DIR:?submit it: sbatch $0 (DRY_RUN=1 $0 shows it first)}}"
[ -f slurm/common.sh ] || { echo "error: submit from the root of the repository, not from $PWD" >&2; exit 2; }
. slurm/common.sh

arms=()
while [ $# -gt 0 ] && [[ $1 != *=* ]]; do arms+=("$1") && shift; done
[ ${#arms[@]} -gt 0 ] || arms=(rope hardclip20 cope20)
if [ -n "${DRY_RUN:-}" ]; then
  status=0 # each arm is a job as of slurm/train_64k.sh
  for arm in "${arms[@]}"; do
    python scripts/job.py preview slurm/train_64k.sh +experiment="$arm" "$@" || status=$?
  done
  exit "$status"
fi
if [ "${SLURM_ARRAY_TASK_COUNT:-1}" -ne ${#arms[@]} ]; then
  echo "warning: ${#arms[@]} arms (${arms[*]}) and ${SLURM_ARRAY_TASK_COUNT:-1} tasks; all are trained with --array=0-$((${#arms[@]} - 1))" >&2
fi
arm=${arms[SLURM_ARRAY_TASK_ID]:-}
[ -n "$arm" ] || { echo "error: --array has a task $SLURM_ARRAY_TASK_ID, and there are ${#arms[@]} arms" >&2; exit 2; }
train +experiment="$arm" "$@"
