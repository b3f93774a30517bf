#!/usr/bin/env bash
# From raw documents to a report, as jobs that wait for each other. Run it on the login node; it submits and returns.
#   slurm/chain.sh arms=rope,hardclip20,cope20 cluster=h100_8 nodes=4 \
#     prepare="64 corpus=mixture_64k corpus.tokenizer=meta-llama/Meta-Llama-3-8B sequence_lengths=[65536] \
#       output=data/llama3_8b_64k" train="data=mixture_64k" evaluate="documents=data/llama3_8b_64k/heldout" \
#     prepare_sft="8 corpus=ultrachat sequence_lengths=[65536] output=data/sft_64k" [sft=... compare=...]
# Each stage's words are overrides of its command; both prepares begin with their number of tasks, and without them the
# data has to be there. Nothing is submitted where a stage does not hold, a run does not fit, or an input is neither on the
# disk nor written by a stage before. A stage that fails takes those that wait for it out of the queue; submit again, and
# what is finished is kept.
set -euo pipefail
shopt -s inherit_errexit # what fails in $(...) ends this script, too
cd "$(dirname "$0")/.."
[ -f slurm/common.sh ] || { echo "error: run it on the login node; it submits jobs itself" >&2; exit 2; } # sbatch's copy
export PATH="$PWD/.venv/bin:$PATH"
python -c 'import ropewalk' 2>/dev/null || { echo "error: ropewalk is not installed; run: make install" >&2; exit 2; }

arms=cope20 cluster=h100_8 nodes=4 prepare='' prepare_sft='' train='' sft='' evaluate='documents=data/text/heldout' compare=''
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

# note ENTRY OVERRIDES...: a line of the chain that is checked. Training and its plan alone have the cluster group.
chain=$(mktemp)
trap 'rm -f "$chain"' EXIT
note() {
  local word words=("$1")
  for word in "${@:2}"; do
    [[ ${1##*/} != @(train|plan).py && $word =~ ^[+~]*cluster[.=] ]] || words+=("$word")
  done
  printf '%q ' "${words[@]}" >>"$chain" && echo >>"$chain"
}

# trains NAME OVERRIDES...: appends the directory of a training to the array NAME, and notes its plan and the training
trains() {
  local said
  local -n directories=$1
  said=$(python scripts/job.py directory train "${@:2}")
  directories+=("$said")
  note scripts/plan.py brief=true nodes="$nodes" "${@:2}"
  note train.py "${@:2}"
}

# Everything is checked before anything is submitted: a typo ends here, and so does a run that does not fit.
runs=() tuned=()
[ ${#prepare[@]} -eq 0 ] || note data_prep/prepare.py n_shards="${prepare[0]}" "${prepare[@]:1}"
[ ${#prepare_sft[@]} -eq 0 ] || note data_prep/prepare.py n_shards="${prepare_sft[0]}" "${prepare_sft[@]:1}"
for i in "${!arms[@]}"; do
  trains runs +experiment="${arms[i]}" "${cluster[@]}" "${train[@]}"
  trains tuned +experiment=sft_64k start_from.run="${runs[i]}" run_name="$(basename "${runs[i]}")_sft" "${cluster[@]}" "${sft[@]}"
  note scripts/evaluate.py checkpoint="${tuned[i]}" output="${tuned[i]}/evaluation" \
    name="$(basename "${tuned[i]}")" "${evaluate[@]}"
done
note scripts/compare.py "runs=[$(IFS=,; echo "${tuned[*]}")]" "${compare[@]}"
python -m ropewalk.cluster.dry_run "$chain" >&2
lead=$(python scripts/plan.py +experiment="${arms[0]}" "${cluster[@]}" nodes="$nodes" "${train[@]}" print=lead_seconds)
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
