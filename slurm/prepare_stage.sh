#!/usr/bin/env bash
# One stage of a preparation; slurm/prepare_data.sh submits all four:
#   sbatch slurm/prepare_stage.sh stage=plan corpus=NAME 'sequence_lengths=[65536]' [overrides]
# With n_shards=N and --array=0-(N-1) each task does its share (stage=tokenize or pack). What is finished is left out when it
# is submitted again.
# Edit these lines for your site.
#SBATCH --job-name=ropewalk-prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit it: sbatch $0}" # SLURM runs a copy of this file from its spool
[ -f slurm/common.sh ] || { echo "error: submit from the root of the repository, not from $PWD" >&2; exit 2; }
. slurm/common.sh

alone prepare data_prep/prepare.py "$@" ${SLURM_ARRAY_TASK_ID:+shard="$SLURM_ARRAY_TASK_ID"}
