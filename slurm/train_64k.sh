#!/usr/bin/env bash
# Llama-3-8B to 64k:  sbatch slurm/train_64k.sh [+experiment=cope20] [overrides]
# Edit these lines for your site; partition and account may also be given to sbatch.
#SBATCH --job-name=ropewalk-64k
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=48:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@600
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

[ $# -gt 0 ] || set -- +experiment=cope20
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node do not meet
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$SLURM_NTASKS
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
export PATH="$PWD/.venv/bin:$PATH"

# One task per GPU, started by srun itself: a signal then reaches the ranks. Ten minutes before the time limit (USR1),
# and on pre-emption (TERM), they save and leave with 75; the job goes back into the queue and on from there.
code=0
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python train.py "$@"' train "$@" || code=$?
[ "$code" -ne 75 ] || exec scontrol requeue "$SLURM_JOB_ID"
exit "$code"
