#!/usr/bin/env bash
# ProLong's second stage: the 64k run, its optimizer state with it, to 512k, then the SFT at 64k.
cd "$(dirname "$0")/../.."
: "${NODES:=8}" "${PROLONG:=data/prolong_mds}" "${PROLONG_512K:=data/prolong_512k_mds}"
: "${EVALUATION_GPUS:=8}" "${EVALUATION_SAMPLES:=50}" # one GPU does not hold 524,288 tokens; 500 samples take a month
. recipes/common.sh

given run outputs/prolong_64k "the run of recipes/prolong_llama3_8b_64k"
given mds "$PROLONG" "ProLong's published 64k data"
given mds "$PROLONG_512K" "ProLong's published 512k data"
given documents data/text/heldout "texts of at least 524,288 tokens that training does not see"
given documents data/text/ultrachat "UltraChat's conversations as .jsonl with a messages column"
stage data_prep/convert_mds.py +mds=prolong_64k root="$PROLONG" tokenizer=meta-llama/Meta-Llama-3-8B \
  output=data/prolong_64k
stage data_prep/convert_mds.py +mds=prolong_512k root="$PROLONG_512K" tokenizer=meta-llama/Meta-Llama-3-8B \
  output=data/prolong_512k
stage data_prep/prepare.py corpus=ultrachat 'sequence_lengths=[65536]' output=data/sft_64k

train +experiment=prolong_512k
train +experiment=sft_64k start_from.run=outputs/prolong_512k run_name=prolong_512k_sft
for run in outputs/prolong_512k outputs/prolong_512k_sft; do
  stage scripts/export.py checkpoint="$run" verify=false
  evaluate checkpoint="$run/export" output="$run/evaluation" documents=data/text/heldout \
    'lengths=[65536,131072,262144,524288]' test_time=none device=auto
  evaluate suite=ruler checkpoint="$run/export" output="$run/evaluation" test_time=none device=auto \
    'lengths=[65536,131072,262144,524288]'
done
stage scripts/compare.py 'runs=[outputs/prolong_512k,outputs/prolong_512k_sft]' output=outputs/prolong_512k.html \
  published=recipes/prolong_llama3_8b_512k/expected.csv title='ProLong at 512k'
