#!/usr/bin/env bash
# SmolLM2-135M past its 8,192 tokens: four spectra without training, on held-out text apart from the training text; then two
# arms continued at 12,288 tokens, as a demonstration. run.sh [losses] [needles] [training]; all by default. Run again, each
# goes on from what is finished.
cd "$(dirname "$0")/../.."
CLUSTER=laptop NODES=1
. recipes/common.sh

data=data/smollm2_135m
out=outputs/smollm2_135m

[ -n "${DRY_RUN:-}" ] || python recipes/smollm2_135m_cpu/fetch.py "$data"
given model "$data/model" "the model that fetch.py unpacks"
given documents "$data/documents" "the text that fetch.py writes"
given heldout "$data/heldout" "the held-out text that fetch.py writes"

declare -A spectra=([rope]=default [cope10]=cope10 [hardclip10]=hardclip10 [yarn2]=yarn2_8k)

measure() { # measure NAME CHECKPOINT [overrides]
  local name=$1 checkpoint=$2
  shift 2
  evaluate "name=$name" "checkpoint=$checkpoint" "output=$out/$name/evaluation" \
    "documents=$data/heldout" 'lengths=[2048,8192,10240,12288]' test_time=none device=cpu dtype=float32 \
    prefill_chunk=12288 'needle.depths=[0.2,0.8]' answers.count=0 "$@"
}

# Losses, and LongPPL over tokens chosen once under YaRN, which reads past 8,192 better than the model as it is
losses() {
  local name
  [ -n "${DRY_RUN:-}" ] || [ -e "$data/heldout/key_tokens.json" ] || python scripts/evaluate.py key_tokens \
    "checkpoint=$data/model" "documents=$data/heldout" length=12288 test_time=yarn_follow device=cpu dtype=float32
  for name in rope cope10 yarn2 hardclip10; do
    measure "$name" "$data/model" "rope=${spectra[$name]}" needle.samples=0
  done
}

needles() {
  local name
  for name in rope cope10 yarn2 hardclip10; do
    measure "$name" "$data/model" "rope=${spectra[$name]}" needle.samples=10
  done
}

training() {
  local arm
  stage data_prep/prepare.py corpus=files "corpus.paths=[$data/documents]" "corpus.tokenizer=$data/model" \
    'sequence_lengths=[12288]' "output=$data/prepared"
  for arm in rope cope10; do
    train +experiment="smollm2/$arm"
    stage scripts/export.py checkpoint="$out/${arm}_trained"
    measure "${arm}_trained" "$out/${arm}_trained/export" needle.samples=0
  done
}

[ $# -gt 0 ] || set -- losses needles training
for part; do
  case $part in
    losses | needles | training) "$part" ;;
    *)
      echo "error: $part is not a stage; there are losses, needles and training" >&2
      exit 2
      ;;
  esac
done

runs=$out/rope,$out/cope10,$out/yarn2,$out/hardclip10
[ ! -d "$out/rope_trained/evaluation" ] || runs+=,$out/rope_trained
[ ! -d "$out/cope10_trained/evaluation" ] || runs+=,$out/cope10_trained
stage scripts/compare.py "runs=[$runs]" baseline=rope published=recipes/smollm2_135m_cpu/expected.csv \
  output="$out/report.html" title='SmolLM2-135M past its trained length'
