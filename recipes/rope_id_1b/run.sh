#!/usr/bin/env bash
# The RoPE-ID paper's 1B model: four arms from scratch at 4k, then three to 32k and 128k. MODEL=rope_id_3b trains the 3B
# model's four arms instead, which the paper does not extend. ABLATIONS=all is the sweep over RoPE-ID's arguments instead,
# with the paper's figure of them, ABLATIONS='share=0.25 ...' a part of it; SLURM trains its arms side by side.
cd "$(dirname "$0")/../.."
: "${CLUSTER:=a100_8}" "${NODES:=2}" "${MODEL:=rope_id_1b}" "${ABLATIONS:=}"
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

# from_scratch ARM: trains and exports it. native is plain RoPE; its run is called rope.
from_scratch() {
  train +experiment="$MODEL" rope="$1"
  stage scripts/export.py checkpoint="$out/${1/native/rope}_4k"
}

every="share=0.125 share=0.25 share=0.375 share=0.625 share=0.75 share=0.875
  shortest_period=2 shortest_period=16 shortest_period=64 longest_period=4096
  temperature_exponent=1.5 temperature_exponent=2.5 temperature_exponent=3.0"
if [ -n "$ABLATIONS" ]; then
  [ "$MODEL" = rope_id_1b ] || { echo "error: MODEL=$MODEL has no published ablations; leave it out" >&2 && exit 2; }
  [ "$ABLATIONS" != all ] || ABLATIONS=$every
  arms=(rope_id_4k) runs=$out/rope_id_4k
  aside train +experiment="$MODEL" rope=rope_id
  for ablation in $ABLATIONS; do
    name=rope_id_${ablation/=/_}
    runs+=,$out/${name}_4k
    # Within the trained length the temperature is 1, whatever its exponent, so that needs no training.
    [[ $ablation != temperature_exponent=* ]] || continue
    arms+=("${name}_4k")
    aside train +experiment="$MODEL" rope=rope_id rope.name="$name" "rope.chain=[{method: rope_id, ${ablation/=/: }}]"
  done
  all_done
  for arm in "${arms[@]}"; do stage scripts/export.py checkpoint="$out/$arm"; done
  for arm in "${arms[@]}"; do
    aside evaluate suite=ruler checkpoint="$out/$arm/export" output="$out/$arm/evaluation" 'lengths=[4096,8192,16384]' \
      suite.published="recipes/rope_id_1b/$published" test_time=none
  done
  for ablation in $ABLATIONS; do
    [[ $ablation == temperature_exponent=* ]] || continue
    name=rope_id_${ablation/=/_}_4k
    aside evaluate suite=ruler checkpoint="$out/rope_id_4k/export" output="$out/$name/evaluation" name="$name" \
      'lengths=[8192,16384]' suite.published="recipes/rope_id_1b/$published" test_time=no_temperature \
      test_time.name="${ablation/=/_}" "test_time.within=[{method: temperature, exponent: ${ablation#*=}}]"
  done
  all_done
  stage scripts/analyze.py ablations "results=[$runs]" published="recipes/rope_id_1b/$published" output="$out/figures"
  stage scripts/compare.py "runs=[$runs]" baseline=rope_id_4k published="recipes/rope_id_1b/$published" \
    output="$out/ablations.html" title='RoPE-ID, one argument at a time'
  exit 0
fi

# From scratch.
for arm in native high_frequency half_rope rope_id; do
  from_scratch "$arm"
  run=${arm/native/rope}_4k
  measure "$run" "$run" '[4096,8192,16384]' rope_id_paper "$published" test_time=none
done
# The YaRN row: the RoPE arm with YaRN beyond its length, by 2 at 8,192 and by 4 at 16,384 as in the paper.
measure yarn_4k rope_4k '[4096,8192,16384]' rope_id_paper "$published" test_time=yarn_follow name=yarn_4k
# RoPE-ID's rows without scaling; up to 4,096 tokens they are those of rope_id_4k.
measure rope_id_unscaled rope_id_4k '[8192,16384]' ruler "$published" test_time=no_temperature name=rope_id_unscaled
runs=$out/rope_4k,$out/high_frequency_4k,$out/half_rope_4k,$out/yarn_4k,$out/rope_id_4k,$out/rope_id_unscaled
stage scripts/compare.py "runs=[$runs]" baseline=rope_4k published="recipes/rope_id_1b/$published" \
  output="$out/from_scratch.html" title='RoPE-ID from scratch at 4k'
# What rotation does to queries and keys within and past the trained length, which the paper's method is drawn from.
analyze geometry "models=[$out/rope_4k/export,$out/rope_id_4k/export]" documents=data/dolma/heldout \
  output="$out/geometry" 'lengths=[1024,4096,8192,16384]'
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
