#!/usr/bin/env bash
# CoPE's paper: Llama-3-8B to 64k in three arms, SFT of each, evaluation of both, and the paper's numbers beside yours.
cd "$(dirname "$0")/../.."
: "${PROLONG:=data/prolong_mds}"
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

# measure RUN PUBLISHED: loss and needle on held-out texts, then the paper's benchmarks, with the published numbers beside
# yours (printed, and in paper.csv). HELMET is a process of its own, and takes one GPU.
measure() {
  local benchmarks=(suite=paper checkpoint="$1/export" output="$1/evaluation" test_time=auto suite.published="$2"
    'lengths=[8192,16384,32768,65536,131072,262144]')
  stage scripts/export.py checkpoint="$1" verify=false
  evaluate checkpoint="$1/export" output="$1/evaluation" documents=data/text/heldout \
    'lengths=[8192,16384,32768,65536,131072,262144]' test_time=auto
  evaluate "${benchmarks[@]}" 'suite.suites=[short,ruler,infinitebench]'
  [ -z "${HELMET:-}" ] || EVALUATION_GPUS=1 evaluate "${benchmarks[@]}" 'suite.suites=[helmet]' "${helmet[@]}"
}

# The paper's numbers are of models after SFT, so they stand beside those alone.
published=recipes/cope_llama3_8b_64k/expected.csv
runs=() tuned=()
for arm in rope hardclip20 cope20; do
  base=outputs/llama3_8b_64k_$arm
  train +experiment="$arm"
  measure "$base" null
  train +experiment=sft_64k start_from.run="$base" run_name="llama3_8b_64k_${arm}_sft" trainer.max_steps=63
  measure "${base}_sft" "$published"
  runs+=("$base") tuned+=("${base}_sft")
done
stage scripts/compare.py "runs=[$(IFS=, && echo "${runs[*]}")]" baseline=llama3_8b_64k_rope published=null \
  output=outputs/cope_llama3_8b_64k_before_sft.html title='Llama-3-8B to 64k with RoPE and HardClip-20 and CoPE-20 before SFT'
stage scripts/compare.py "runs=[$(IFS=, && echo "${tuned[*]}")]" baseline=llama3_8b_64k_rope_sft published="$published" \
  output=outputs/cope_llama3_8b_64k.html title='Llama-3-8B to 64k with RoPE and HardClip-20 and CoPE-20 after SFT'
