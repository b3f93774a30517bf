# shellcheck shell=bash
# What the recipes' run.sh share; each sources it from the repository's root. CLUSTER (a name in configs/cluster) and NODES
# say where training runs, EVALUATION_GPUS how many GPUs one evaluation has, EVALUATION_SAMPLES how many samples of a suite's
# tasks are run, in place of all, and EVALUATION_DATA where RULER's offline data lies, in place of the hub. DRY_RUN=1 runs
# nothing: every stage composes and validates its configuration, training is planned, and each input must be promised by a
# stage before.
set -euo pipefail
shopt -s inherit_errexit # what fails in $(...) ends the recipe, too
export PATH="$PWD/.venv/bin:$PATH"
: "${CLUSTER:=h100_8}" "${NODES:=4}" "${EVALUATION_GPUS:=1}" "${EVALUATION_SAMPLES:=}" "${EVALUATION_DATA:=}"

# Looked for, not imported: torch alone takes seconds.
if ! python -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("ropewalk") is None)' 2>/dev/null; then
  echo "error: ropewalk is not installed; run: make install" >&2
  exit 2
fi

if [ -n "${DRY_RUN:-}" ]; then
  chain=$(mktemp)
  check_chain() {
    local status=$?
    [ "$status" -ne 0 ] || python -m ropewalk.cluster.dry_run "$chain" || status=$?
    rm -f "$chain"
    exit "$status"
  }
  trap check_chain EXIT
fi

# note WORD...: a line of the chain that is checked
note() { printf '%q ' "$@" >>"$chain" && echo >>"$chain"; }

# stage ENTRY ARGUMENTS...: one command of this repository, on this machine
stage() {
  if [ -n "${DRY_RUN:-}" ]; then note "$@"; else python "$@"; fi
}

# given KIND PATH WHAT: what you bring yourself (KIND: mds, documents, model, heldout, run)
given() {
  if [ -n "${DRY_RUN:-}" ]; then
    note given "$2" "$1"
  elif [ ! -e "$2" ]; then
    echo "error: $2 is not there; it should be $3 (see the recipe's README)" >&2
    exit 2
  elif [ -d "$2" ] && [ -z "$(ls -A "$2")" ]; then
    echo "error: $2 is empty; it should be $3 (see the recipe's README)" >&2
    exit 2
  fi
}

# train OVERRIDES...: plan, then train: on a laptop here, else through SLURM where there is one, else on this node's GPUs
train() {
  if [ -n "${DRY_RUN:-}" ]; then
    note scripts/plan.py brief=true "cluster=$CLUSTER" "nodes=$NODES" "$@"
    note train.py "$@"
  elif [ "$CLUSTER" = laptop ]; then
    python train.py "$@"
  elif command -v sbatch >/dev/null; then
    local lead options
    python scripts/plan.py "cluster=$CLUSTER" "nodes=$NODES" "$@"
    lead=$(python scripts/plan.py "cluster=$CLUSTER" "nodes=$NODES" "$@" print=lead_seconds)
    options=$(python scripts/job.py options "cluster=$CLUSTER" "nodes=$NODES" "lead_seconds=$lead")
    mapfile -t options <<<"$options"
    sbatch --wait "${options[@]}" slurm/train_64k.sh "cluster=$CLUSTER" "$@"
  else
    python scripts/plan.py "cluster=$CLUSTER" nodes=1 "$@"
    torchrun --standalone --nproc-per-node=gpu train.py "$@"
  fi
}

# evaluate ARGUMENTS...: scripts/evaluate.py, through SLURM where there is one. A model that device=auto spreads over
# EVALUATION_GPUS is one process; else there is one process a GPU, and they share the samples.
# Numbers that are NaN are no end: the evaluation says so with code 4, and the comparison shows them.
evaluate() {
  local options word output='' status=0 tasks=$EVALUATION_GPUS
  for word in "$@"; do [[ $word != output=* ]] || output=${word#output=}; done
  [[ " $* " != *" device=auto "* ]] || tasks=1
  if [[ " $*" == *" suite="* ]]; then
    set -- "$@" ${EVALUATION_SAMPLES:+"suite.samples=$EVALUATION_SAMPLES"} ${EVALUATION_DATA:+"suite.data=$EVALUATION_DATA"}
  fi
  if [ -n "${DRY_RUN:-}" ]; then
    note scripts/evaluate.py "$@"
  elif [ "$CLUSTER" != laptop ] && command -v sbatch >/dev/null; then
    options=$(python scripts/job.py options "cluster=$CLUSTER" nodes=1 "cluster.gpus_per_node=$EVALUATION_GPUS")
    mapfile -t options <<<"$options"
    # --ntasks, too: slurm/evaluate.sh has a line of it, which --ntasks-per-node alone does not outdo
    sbatch --wait "${options[@]}" --ntasks="$tasks" --ntasks-per-node="$tasks" slurm/evaluate.sh "cluster=$CLUSTER" "$@"
  elif [ "$tasks" -gt 1 ]; then # torchrun has one code for every failure
    torchrun --standalone --nproc-per-node="$tasks" scripts/evaluate.py "$@" || status=$?
    [ "$status" -eq 0 ] || [ -s "$output/not_finite.txt" ] || return "$status"
  else
    python scripts/evaluate.py "$@" || status=$?
    [ "$status" -eq 0 ] || [ "$status" -eq 4 ] || return "$status"
  fi
}

# analyze COMMAND ARGUMENTS...: scripts/analyze.py on a GPU, through SLURM where there is one
analyze() {
  local options
  if [ -n "${DRY_RUN:-}" ]; then
    note scripts/analyze.py "$@"
  elif [ "$CLUSTER" != laptop ] && command -v sbatch >/dev/null; then
    options=$(python scripts/job.py options "cluster=$CLUSTER" nodes=1 cluster.gpus_per_node=1)
    mapfile -t options <<<"$options"
    sbatch --wait "${options[@]}" --job-name=ropewalk-analyze --output='%x-%j.log' \
      --wrap "$(printf '%q ' exec python scripts/analyze.py "$@")"
  else
    python scripts/analyze.py "$@"
  fi
}

# each FUNCTION WORD...: the function once for each word, PROCESSES (one a core) at a time
each() {
  local job=$1 word
  shift
  for word; do
    if [ -n "${DRY_RUN:-}" ]; then
      "$job" "$word"
    else
      while [ "$(jobs -rp | wc -l)" -ge "${PROCESSES:-$(nproc)}" ]; do wait -n; done
      "$job" "$word" &
    fi
  done
  while [ -n "$(jobs -rp)" ]; do wait -n; done
}

# aside COMMAND ARGUMENTS...: one of several stages that need nothing of each other: side by side in SLURM's queue, else now
background=()
aside() {
  if [ -z "${DRY_RUN:-}" ] && [ "$CLUSTER" != laptop ] && command -v sbatch >/dev/null; then
    "$@" &
    background+=($!)
  else
    "$@"
  fi
}

# all_done: waits for what was put aside; ends the recipe where one of them has failed
all_done() {
  local pid status=0
  for pid in "${background[@]}"; do wait "$pid" || status=$?; done
  background=()
  return "$status"
}
