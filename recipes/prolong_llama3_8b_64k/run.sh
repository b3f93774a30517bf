#!/usr/bin/env bash
# ProLong's first stage: Llama-3-8B-Instruct to 64k, then its SFT.
cd "$(dirname "$0")/../.."
: "${PROLONG:=data/prolong_mds}"
. recipes/common.sh

given mds "$PROLONG" "ProLong's published 64k data"
given documents data/text/heldout "texts of at least 131,072 tokens that training does not see"
given documents data/text/ultrachat "UltraChat's conversations as .jsonl with a messages column"
stage data_prep/convert_mds.py +mds=prolong_64k root="$PROLONG" tokenizer=meta-llama/Meta-Llama-3-8B \
  output=data/prolong_64k
stage data_prep/prepare.py corpus=ultrachat 'sequence_lengths=[65536]' output=data/sft_64k

train +experiment=prolong_64k
train +experiment=sft_64k start_from.run=outputs/prolong_64k run_name=prolong_64k_sft
for run in outputs/prolong_64k outputs/prolong_64k_sft; do
  stage scripts/export.py checkpoint="$run" verify=false
  evaluate checkpoint="$run/export" output="$run/evaluation" documents=data/text/heldout \
    'lengths=[8192,16384,32768,65536,131072]' test_time=none
  evaluate suite=ruler checkpoint="$run/export" output="$run/evaluation" test_time=none \
    'lengths=[8192,16384,32768,65536,131072]'
done
stage scripts/compare.py 'runs=[outputs/prolong_64k,outputs/prolong_64k_sft]' output=outputs/prolong_64k.html \
  published=recipes/prolong_llama3_8b_64k/expected.csv title='ProLong at 64k'
