#!/usr/bin/env bash
# A corpus on many nodes:  slurm/prepare_data.sh TASKS corpus=NAME 'sequence_lengths=[65536]' [overrides]
# Run it on the login node (it is no job itself): it submits the plan, an array of TASKS jobs that tokenize, an array
# that packs, and the finish, each after the one before. What is finished is skipped when it is submitted again. Give
# partition, account and time of all four in SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT.
set -euo pipefail
cd "$(dirname "$0")/.."

tasks=${1:?usage: slurm/prepare_data.sh TASKS corpus=NAME \'sequence_lengths=[65536]\' [overrides]}
shift

# submit NAME DEPENDENCY SBATCH_OPTIONS... -- OVERRIDES...: prints the job's number
submit() {
  local name=$1 after=$2 options=() command
  shift 2
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  shift
  printf -v command ' %q' "$@"
  sbatch --parsable --job-name="ropewalk-$name" --output="${SBATCH_OUTPUT:-%x-%j.log}" --open-mode=append --requeue \
    ${after:+--dependency=afterok:$after} --kill-on-invalid-dep=yes \
    "${options[@]}" --wrap "PATH=\"$PWD/.venv/bin:\$PATH\" exec python data_prep/prepare.py stage=$name$command \
    ${options[1]:+shard=\$SLURM_ARRAY_TASK_ID n_shards=$tasks}"
}

plan=$(submit plan "" --cpus-per-task=1 -- "$@")
tokenize=$(submit tokenize "$plan" --cpus-per-task=1 --array="0-$((tasks - 1))" -- "$@")
pack=$(submit pack "$tokenize" --cpus-per-task=1 --array="0-$((tasks - 1))" -- "$@")
finish=$(submit finish "$pack" --cpus-per-task=1 -- "$@")
echo "plan $plan, tokenize $tokenize, pack $pack, finish $finish"
