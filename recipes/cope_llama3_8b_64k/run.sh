#!/usr/bin/env bash
# CoPE's paper: Llama-3-8B to 64k in three arms, SFT of each, evaluation of both, and the paper's numbers beside yours.
# run.sh [floor] [arms]; both by default. SEEDS are those of the arms, FLOOR_SEEDS those of the floor's runs of FLOOR_STEPS.
cd "$(dirname "$0")/../.."
: "${PROLONG:=data/prolong_mds}" "${SEEDS:=0}" "${FLOOR_SEEDS:=0 1 2 3}" "${FLOOR_STEPS:=250}"
. recipes/common.sh

# HELMET is a checkout of HELMET's own code, HELMET_PYTHON the python of its environment; without them the other benchmarks
# are run.
if [ -n "${HELMET:-}" ]; then
  helmet=(suite.helmet.checkout="$HELMET" suite.helmet.python="${HELMET_PYTHON:?name the python of the environment of HELMET}")
fi

given mds "$PROLONG" "ProLong's published 64k data"
given documents data/text/heldout "texts of at least 262,144 tokens that training does not see"
given documents data/text/ultrachat "UltraChat's conversations as .jsonl with a messages column"
stage data_prep/convert_mds.py +mds=prolong_64k root="$PROLONG" tokenizer=meta-llama/Meta-Llama-3-8B \
  output=data/prolong_64k
stage data_prep/prepare.py corpus=ultrachat 'sequence_lengths=[65536]' output=data/sft_64k

# study RUN: answers, losses and needles on held-out texts, as trained and with YaRN past 65,536. The run is exported.
study() {
  evaluate checkpoint="$1" output="$1/evaluation" documents=data/text/heldout \
    'lengths=[8192,16384,32768,65536,131072,262144]' 'test_time=[none,auto]'
}

# benchmark RUN PUBLISHED: the paper's benchmarks, with the published numbers beside yours (printed, and in paper.csv).
# HELMET is a process of its own, and takes one GPU.
benchmark() {
  local benchmarks=(suite=paper checkpoint="$1" output="$1/evaluation" test_time=auto suite.published="$2"
    'lengths=[8192,16384,32768,65536,131072,262144]')
  evaluate "${benchmarks[@]}" 'suite.suites=[short,ruler,infinitebench]'
  [ -z "${HELMET:-}" ] || EVALUATION_GPUS=1 evaluate "${benchmarks[@]}" 'suite.suites=[helmet]' "${helmet[@]}"
}

# The floor: short runs of two arms that differ in their seeds, measured as the arms will be. How far the arms' difference
# varies over them says how many seeds the declared one would take.
floor() {
  local seed arm floors=()
  for seed in $FLOOR_SEEDS; do
    for arm in rope cope20; do
      floors+=("outputs/llama3_8b_64k_floor_$arm-s$seed")
      train +experiment="$arm" run_name="llama3_8b_64k_floor_$arm-s$seed" trainer.seed="$seed" \
        trainer.max_steps="$FLOOR_STEPS" trainer.checkpoint_every="$FLOOR_STEPS"
      study "${floors[-1]}"
    done
  done
  stage scripts/noise.py "runs=[$(IFS=, && echo "${floors[*]}")]" difference=5 output=outputs/cope_llama3_8b_64k_floor
}

# The arms over SEEDS, compared as they were declared; of the first seed also the SFT and the paper's benchmarks, before
# and after it. The paper's numbers are of models after SFT, so they stand beside those alone.
arms() {
  local seed arm run runs=() tuned=() first=${SEEDS%% *} published=recipes/cope_llama3_8b_64k/expected.csv
  for seed in $SEEDS; do
    for arm in rope hardclip20 cope20; do
      run=outputs/llama3_8b_64k_$arm-s$seed
      train +experiment="$arm" run_name="llama3_8b_64k_$arm-s$seed" trainer.seed="$seed"
      study "$run"
      runs+=("$run")
    done
  done
  stage scripts/compare.py "runs=[$(IFS=, && echo "${runs[*]}")]" baseline="llama3_8b_64k_rope-s$first" published=null \
    output=outputs/cope_llama3_8b_64k_before_sft.html title='Llama-3-8B to 64k with RoPE and HardClip-20 and CoPE-20 before SFT'
  for arm in rope hardclip20 cope20; do
    run=outputs/llama3_8b_64k_$arm-s$first
    benchmark "$run" null
    train +experiment=sft_64k start_from.run="$run" run_name="llama3_8b_64k_$arm-s${first}_sft" trainer.max_steps=63
    study "${run}_sft"
    benchmark "${run}_sft" "$published"
    tuned+=("${run}_sft")
  done
  stage scripts/compare.py "runs=[$(IFS=, && echo "${tuned[*]}")]" baseline="llama3_8b_64k_rope-s${first}_sft" \
    published="$published" output=outputs/cope_llama3_8b_64k.html \
    title='Llama-3-8B to 64k with RoPE and HardClip-20 and CoPE-20 after SFT'
}

[ $# -gt 0 ] || set -- floor arms
for part; do
  case $part in
    floor | arms) "$part" ;;
    *)
      echo "error: $part is not a stage; there are floor and arms" >&2
      exit 2
      ;;
  esac
done
