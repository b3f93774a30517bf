#!/usr/bin/env bash
# A corpus on many nodes:  slurm/prepare_data.sh TASKS corpus=NAME 'sequence_lengths=[65536]' [cluster=NAME] [overrides]
# Run it on the login node (it is no job itself): it submits the plan, an array of TASKS jobs that tokenize, an array
# that packs, and the finish, each after the one before. What is finished is skipped when it is submitted again. The
# cluster group gives partition and account; without it they are the site's, or SBATCH_PARTITION's and SBATCH_ACCOUNT's.
set -euo pipefail
shopt -s inherit_errexit # what fails in $(...) ends this script, too
cd "$(dirname "$0")/.."
[ -f slurm/common.sh ] || { echo "error: run it on the login node; it submits jobs itself" >&2; exit 2; } # sbatch's copy
export PATH="$PWD/.venv/bin:$PATH"
python -c 'import ropewalk' 2>/dev/null || { echo "error: ropewalk is not installed; run: make install" >&2; exit 2; }

tasks=${1:?usage: slurm/prepare_data.sh TASKS corpus=NAME \'sequence_lengths=[65536]\' [cluster=NAME] [overrides]}
shift

cluster=()
for word in "$@"; do
  [[ ! $word =~ ^[+~]*cluster[.=] ]] || cluster+=("$word")
done
options=()
if [ ${#cluster[@]} -gt 0 ]; then
  said=$(python scripts/job.py options "${cluster[@]}" nodes=1 cluster.gpus_per_node=1 cluster.slurm.gpu_request=false \
    cluster.slurm.cpus_per_gpu=1)
  mapfile -t options <<<"$said"
fi
words=("$@" n_shards="$tasks")
python scripts/job.py directory prepare "${words[@]}" >/dev/null # a typo ends here

# submit STAGE AFTER [SBATCH_OPTIONS...]: prints the job's number
submit() {
  sbatch --parsable --job-name="ropewalk-$1" ${SBATCH_OUTPUT:+--output="$SBATCH_OUTPUT"} --kill-on-invalid-dep=yes \
    ${2:+--dependency=afterok:$2} "${options[@]}" "${@:3}" slurm/prepare_stage.sh stage="$1" "${words[@]}"
}

plan=$(submit plan "")
tokenize=$(submit tokenize "$plan" --array="0-$((tasks - 1))")
pack=$(submit pack "$tokenize" --array="0-$((tasks - 1))")
finish=$(submit finish "$pack")
echo "plan $plan, tokenize $tokenize, pack $pack, finish $finish"
