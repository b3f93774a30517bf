#!/usr/bin/env bash
# Does clipping help? RoPE, HardClip and CoPE over ten seeds in two regimes, as plan.yaml declares; then a survey of other
# methods, test-time scaling of the core's runs, the core again at four times the parameters over five seeds, as
# plan_large.yaml declares, and RoPE under other schedules and averaged, as plan_schedules.yaml does.
# run.sh [core] [survey] [scaling] [large] [schedules]; core by default. One process a core (PROCESSES); run again, it goes on
# from what is finished.
cd "$(dirname "$0")/../.."
CLUSTER=laptop NODES=1
. recipes/common.sh
export OMP_NUM_THREADS=1

data=data/extrapolation_small

# size NAME PLAN MODEL: the runs' directory, their plan and their model from here on
size() {
  out=outputs/$1 model=$3
  study=(scripts/study.py "plan=recipes/extrapolation_small/$2" "results=$out")
}
size extrapolation_small plan.yaml demo

# The survey's arms, from scratch: name and chain
declare -A survey=(
  [hope]='[{method: hope}]'
  [p_rope]='[{method: p_rope, fraction: 0.75}]'
  [half]='[{method: half_rope}]'
  [high_frequency]='[{method: high_frequency}]'
  [rope_id]='[{method: rope_id}]'
  [cope4]='[{method: cope, clip: 4}]'
  [cope11]='[{method: cope, clip: 11}]'
  [nope]='[{method: p_rope, fraction: 0.0}]'
  [learned]='[{method: learned, learning_rate: 0.01}]'
  [nope_layer]='[{method: nope_layers, every: 2}]'
  [log_temperature]='[{method: log_temperature, length: 16}]'
  [fmrope]='[{method: abf, theta: trained_length}]'
)

# measure REGIME SEED TEST_TIME ARM...: answers, order and loss of the arms of one seed
measure() {
  local regime=$1 seed=$2 test_time=$3 lengths='[64,128,256,512]'
  shift 3
  [ "$regime" = scratch ] || lengths='[256,512,1024,2048]'
  # shellcheck disable=SC2046,SC2059 # words
  evaluate runs $(printf "$out/$regime/%s-s$seed " "$@") "documents=$data/heldout" "lengths=$lengths" \
    "test_time=$test_time" device=cpu dtype=float32 needle.names=false needle.samples=0 answers.count=512 \
    "compare.output=$out/reports/$regime-s$seed-$1.html"
}

# run REGIME ARM SEED OVERRIDE...: one run of the trainer
run() {
  train +experiment="extrapolation/$1" model="$model" "run_name=${out#outputs/}/$1/$2-s$3" "rope.name=$2" "trainer.seed=$3" \
    "${@:4}"
}

# base SEED: RoPE from scratch, which is an arm of the first regime and where the arms of the second continue from
base() {
  run scratch rope "$1"
  measure scratch "$1" none rope
}

# arms SEED: all other runs of the core
arms() {
  local arm
  for arm in hardclip cope; do
    run scratch "$arm" "$1" "rope=${arm}_auto"
  done
  measure scratch "$1" none hardclip cope
  for arm in rope hardclip cope; do
    run continued "$arm" "$1" "rope=demo_$arm" "start_from.run=$out/scratch/rope-s$1"
  done
  measure continued "$1" none rope hardclip cope
}

# others SEED: the survey's runs
others() {
  local arm
  for arm in "${!survey[@]}"; do
    run scratch "$arm" "$1" "rope.chain=${survey[$arm]}"
  done
  measure scratch "$1" none "${!survey[@]}"
}

# scaled SEED: the core's runs of the second regime with scaling at test time
scaled() { measure continued "$1" '[none,yarn_follow,pi_follow,ntk_follow]' rope hardclip cope; }

# schedules SEED: RoPE from scratch under four schedules, and the mean of the last four checkpoints of two of them
schedules() {
  local arm kept=(trainer.checkpoint_every=15 trainer.keep_last=4)
  run scratch cosine "$1" "${kept[@]}"
  run scratch constant "$1" "${kept[@]}" trainer.decay_ratio=0
  run scratch linear "$1" trainer.schedule=linear trainer.min_lr_ratio=0
  run scratch decayed "$1" trainer.schedule=linear trainer.min_lr_ratio=0 trainer.decay_ratio=0.2
  for arm in cosine constant; do
    stage scripts/export.py "checkpoint=$out/scratch/$arm-s$1" average.last=4 "output=$out/scratch/mean_$arm-s$1"
  done
  measure scratch "$1" none cosine constant linear decayed mean_cosine mean_constant
}

# seeds WHICH: next or accepted; of a dry run the first alone
seeds() { if [ -n "${DRY_RUN:-}" ]; then echo 0; else python "${study[@]}" collect=true "seeds=$1"; fi; }

stage data_prep/prepare.py corpus=demo "output=$data" 'sequence_lengths=[64,256]'

# core: the bases, until enough seeds are accepted, then all other arms of those
core() {
  while wanted=$(seeds next) && [ -n "$wanted" ]; do
    # shellcheck disable=SC2086 # numbers
    each base $wanted
    [ -z "${DRY_RUN:-}" ] || break
  done
  # shellcheck disable=SC2046
  each arms $(seeds accepted)
}

for stage in "${@:-core}"; do
  case $stage in
    core) core ;;
    large)
      size extrapolation_large plan_large.yaml demo_large
      core
      [ -n "${DRY_RUN:-}" ] || python "${study[@]}" collect=true
      size extrapolation_small plan.yaml demo
      ;;
    schedules)
      size extrapolation_schedules plan_schedules.yaml demo
      each schedules 0 1 2 3 4
      [ -n "${DRY_RUN:-}" ] || python "${study[@]}" collect=true
      size extrapolation_small plan.yaml demo
      ;;
    survey)
      # shellcheck disable=SC2046
      each others $(seeds accepted | cut -d' ' -f1-5)
      ;;
    scaling)
      # shellcheck disable=SC2046
      each scaled $(seeds accepted | cut -d' ' -f1-5)
      ;;
    *)
      echo "error: $stage is not a stage; there are core, survey, scaling, large and schedules" >&2
      exit 2
      ;;
  esac
done
[ -n "${DRY_RUN:-}" ] || python "${study[@]}" collect=true
