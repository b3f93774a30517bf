#!/usr/bin/env bash
# From raw documents to a report, as jobs that wait for each other. Run it on the login node; it submits and returns.
#   slurm/chain.sh arms=rope,hardclip20,cope20 cluster=h100_8 nodes=4 \
#     prepare="64 corpus=sources sequence_lengths=[65536]" prepare_sft="8 corpus=ultrachat sequence_lengths=[65536] \
#     output=data/sft_64k" evaluate="documents=data/sources/heldout" [train=... sft=... compare=...]
# Each stage's words are overrides of its command; both prepares begin with their number of tasks, and without them the
# data is taken to be there. A stage that fails takes those that wait for it out of the queue; submit again, and what is finished
# is kept.
set -euo pipefail
shopt -s inherit_errexit # what fails in $(...) ends this script, too
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

arms=cope20 cluster=h100_8 nodes=4 prepare='' prepare_sft='' train='' sft='' evaluate='documents=data/sources/heldout' compare=''
for word in "$@"; do
  case ${word%%=*} in
    arms | cluster | nodes | prepare | prepare_sft | train | sft | evaluate | compare) printf -v "${word%%=*}" %s "${word#*=}" ;;
    *) echo "error: $word; say arms= cluster= nodes= prepare= prepare_sft= train= sft= evaluate= or compare=" >&2 && exit 2 ;;
  esac
done
# Words of a stage may have brackets and braces, which the shell must leave alone.
set -f
# shellcheck disable=SC2206
prepare=($prepare) prepare_sft=($prepare_sft) train=($train) sft=($sft) evaluate=($evaluate) compare=($compare) cluster=(${cluster:+cluster=$cluster})
IFS=, read -ra arms <<<"$arms"

# options NAME OVERRIDES...: sets the array NAME to what the cluster group says, for sbatch
options() {
  local said
  said=$(python scripts/job.py options "${cluster[@]}" "${@:2}")
  mapfile -t "$1" <<<"$said"
}

# submit AFTER SBATCH_WORDS...: prints the job's number; AFTER is the job, or jobs with : between, that must succeed first
submit() { sbatch --parsable --kill-on-invalid-dep=yes ${1:+--dependency="afterok:$1"} "${@:2}"; }

# Everything is composed before anything is submitted: a typo ends here.
runs=() tuned=()
for arm in "${arms[@]}"; do
  run=$(python scripts/job.py directory train +experiment="$arm" "${cluster[@]}" "${train[@]}")
  runs+=("$run")
  tuned+=("$(python scripts/job.py directory train +experiment=sft_64k start_from.run="$run" \
    run_name="$(basename "$run")_sft" "${cluster[@]}" "${sft[@]}")")
done
python scripts/job.py directory evaluate checkpoint=x output=x "${evaluate[@]}" >/dev/null
python scripts/job.py directory compare "runs=[$(IFS=,; echo "${tuned[*]}")]" "${compare[@]}" >/dev/null
lead=$(python scripts/plan.py +experiment="${arms[0]}" "${cluster[@]}" nodes="$nodes" "${train[@]}" print=lead_seconds)
[ ${#prepare[@]} -eq 0 ] || python scripts/job.py directory prepare "${prepare[@]:1}" >/dev/null
[ ${#prepare_sft[@]} -eq 0 ] || python scripts/job.py directory prepare "${prepare_sft[@]:1}" >/dev/null
training=() single=() cpu=()
options training nodes="$nodes" lead_seconds="$lead"
options single nodes=1 cluster.gpus_per_node=1
options cpu nodes=1 cluster.gpus_per_node=1 cluster.slurm.gpu_request=false cluster.slurm.cpus_per_gpu=1

# prepared TASKS OVERRIDES...: submits a preparation and says so; prints the last of its jobs
prepared() {
  local said
  [ $# -gt 0 ] || return 0
  said=$(slurm/prepare_data.sh "$@" "${cluster[@]}")
  echo "prepare: $said" >&3
  echo "${said##* }"
}

exec 3>&1 # a submitted preparation is told there, since its stdout is its result
data=$(prepared "${prepare[@]}")
chat=$(prepared "${prepare_sft[@]}")
evaluated=''
for i in "${!arms[@]}"; do
  pretrained=$(submit "$data" "${training[@]}" slurm/train_64k.sh +experiment="${arms[i]}" "${cluster[@]}" "${train[@]}")
  finetuned=$(submit "$pretrained${chat:+:$chat}" "${training[@]}" slurm/sft_64k.sh from="${runs[i]}" "${cluster[@]}" "${sft[@]}")
  scored=$(submit "$finetuned" "${single[@]}" slurm/evaluate.sh checkpoint="${tuned[i]}" output="${tuned[i]}/evaluation" \
    name="$(basename "${tuned[i]}")" "${cluster[@]}" "${evaluate[@]}")
  evaluated+=${evaluated:+:}$scored
  echo "${arms[i]}: train $pretrained, sft $finetuned, evaluate $scored"
done
echo "compare: $(submit "$evaluated" "${cpu[@]}" slurm/compare.sh "runs=[$(IFS=,; echo "${tuned[*]}")]" \
  "${cluster[@]}" "${compare[@]}")"
