#!/usr/bin/env bash
# SmolLM2-135M past its 8,192 tokens: four spectra without training, then two arms continued at 12,288 tokens.
cd "$(dirname "$0")/../.."
CLUSTER=laptop NODES=1
. recipes/common.sh

data=data/smollm2_135m
out=outputs/smollm2_135m

[ -n "${DRY_RUN:-}" ] || python recipes/smollm2_135m_cpu/fetch.py "$data"
given model "$data/model" "the model that fetch.py unpacks"
given documents "$data/documents" "the text that fetch.py writes"
given heldout "$data/heldout" "the held-out text that fetch.py writes"
stage data_prep/prepare.py corpus=files "corpus.paths=[$data/documents]" "corpus.tokenizer=$data/model" \
  'sequence_lengths=[12288]' "output=$data/prepared"

measure() { # measure NAME CHECKPOINT [overrides]
  local name=$1 checkpoint=$2
  shift 2
  evaluate "name=$name" "checkpoint=$checkpoint" "output=$out/$name/evaluation" \
    "documents=$data/heldout" 'lengths=[2048,8192,10240,12288]' test_time=none device=cpu dtype=float32 \
    'needle.depths=[0.2,0.8]' needle.samples=1 answers.count=0 "$@"
}

measure rope "$data/model"
measure cope10 "$data/model" rope=cope10
measure hardclip10 "$data/model" rope=hardclip10
measure yarn2 "$data/model" rope=yarn2_8k

for arm in rope cope10; do
  train +experiment="smollm2/$arm"
  stage scripts/export.py checkpoint="$out/${arm}_trained"
  measure "${arm}_trained" "$out/${arm}_trained/export"
done

stage scripts/compare.py "runs=[$out/rope,$out/cope10,$out/hardclip10,$out/yarn2,$out/rope_trained,$out/cope10_trained]" \
  baseline=rope published=recipes/smollm2_135m_cpu/expected.csv output="$out/report.html" title='SmolLM2-135M past its trained length'
