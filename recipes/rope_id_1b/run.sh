#!/usr/bin/env bash
# The RoPE-ID paper's 1B model: four arms from scratch at 4k, then three to 32k and 128k. MODEL=rope_id_3b trains the 3B
# model's four arms instead, which the paper does not extend.
cd "$(dirname "$0")/../.."
: "${CLUSTER:=a100_8}" "${NODES:=2}" "${MODEL:=rope_id_1b}"
. recipes/common.sh

out=outputs/$MODEL

given documents data/text/dolma "Dolma as .jsonl.gz"
stage data_prep/prepare.py corpus=dolma 'sequence_lengths=[4096,32768,131072]'

# measure RUN CHECKPOINT LENGTHS SUITE PUBLISHED [overrides]: loss and needle on held-out texts, then the suite
# with the paper's numbers beside yours (printed, and in paper.csv)
measure() {
  local run=$1 checkpoint=$2 lengths=$3 suite=$4 published=recipes/rope_id_1b/$5
  shift 5
  evaluate checkpoint="$out/$checkpoint/export" output="$out/$run/evaluation" documents=data/dolma/heldout \
    "lengths=$lengths" "$@"
  evaluate suite="$suite" checkpoint="$out/$checkpoint/export" output="$out/$run/evaluation" "lengths=$lengths" \
    suite.published="$published" "$@"
}
published=expected.csv
[ "$MODEL" = rope_id_1b ] || published=expected_3b.csv

# From scratch. native is plain RoPE; its run is called rope.
for arm in native high_frequency half_rope rope_id; do
  run=${arm/native/rope}_4k
  train +experiment="$MODEL" rope="$arm"
  stage scripts/export.py checkpoint="$out/$run"
  measure "$run" "$run" '[4096,8192,16384]' rope_id_paper "$published" test_time=none
done
# The YaRN row: the RoPE arm with YaRN beyond its length, by 2 at 8,192 and by 4 at 16,384 as in the paper.
measure yarn_4k rope_4k '[4096,8192,16384]' rope_id_paper "$published" test_time=yarn_follow name=yarn
stage scripts/compare.py "runs=[$out/rope_4k,$out/high_frequency_4k,$out/half_rope_4k,$out/yarn_4k,$out/rope_id_4k]" \
  baseline=rope_4k published="recipes/rope_id_1b/$published" output="$out/from_scratch.html" title='RoPE-ID from scratch at 4k'
[ "$MODEL" = rope_id_1b ] || exit 0

# extend FROM TO EXPERIMENT ROPE: one jump of one arm
extend() {
  train +experiment="$3" rope="$4" model.path="$out/$1/export" run_name="rope_id_1b/$2"
  stage scripts/export.py checkpoint="$out/$2"
}

extend rope_4k yarn_32k rope_id_1b_32k yarn8
extend rope_id_4k rope_id_32k rope_id_1b_32k default
extend rope_id_4k rope_id_yarn_32k rope_id_1b_32k rope_id_yarn8
extend yarn_32k yarn_128k rope_id_1b_128k yarn4
extend rope_id_32k rope_id_128k rope_id_1b_128k default
extend rope_id_yarn_32k rope_id_yarn_128k rope_id_1b_128k rope_id_yarn4
for run in yarn_128k rope_id_128k rope_id_yarn_128k; do
  measure "$run" "$run" '[4096,8192,16384,32768,65536,131072]' ruler expected_128k.csv test_time=none
done
stage scripts/compare.py "runs=[$out/yarn_128k,$out/rope_id_128k,$out/rope_id_yarn_128k]" baseline=yarn_128k \
  published=recipes/rope_id_1b/expected_128k.csv output="$out/extended.html" title='RoPE-ID extended to 128k'
