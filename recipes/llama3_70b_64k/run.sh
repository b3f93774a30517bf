#!/usr/bin/env bash
# Llama-3-70B to 64k in three arms, as cope_llama3_8b_64k does it with Llama-3-8B.
cd "$(dirname "$0")/../.."
: "${CLUSTER:=h100_8}" "${NODES:=8}" "${EVALUATION_GPUS:=8}"
. recipes/common.sh

: "${PROLONG:=data/prolong_mds}"
given mds "$PROLONG" "ProLong's published 64k data"
stage data_prep/convert_mds.py +mds=prolong_64k root="$PROLONG" tokenizer=meta-llama/Meta-Llama-3-70B \
  output=data/prolong_64k
heldout=data/text/heldout
given documents "$heldout" "texts of at least 131,072 tokens that training does not see"

runs=()
for arm in rope hardclip20 cope20; do
  run=outputs/llama3_70b_64k_$arm
  train +experiment=llama3_70b_64k rope="$arm"
  stage scripts/export.py checkpoint="$run" verify=false
  evaluate checkpoint="$run/export" output="$run/evaluation" documents="$heldout" \
    'lengths=[8192,16384,32768,65536,131072]' test_time=auto device=auto
  evaluate suite=ruler checkpoint="$run/export" output="$run/evaluation" test_time=auto device=auto \
    'lengths=[8192,16384,32768,65536,131072]'
  runs+=("$run")
done
stage scripts/compare.py "runs=[$(IFS=, && echo "${runs[*]}")]" baseline=llama3_70b_64k_rope \
  published=recipes/llama3_70b_64k/expected.csv output=outputs/llama3_70b_64k.html title='Llama-3-70B to 64k'
