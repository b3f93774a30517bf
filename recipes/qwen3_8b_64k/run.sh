#!/usr/bin/env bash
# Qwen3-8B-Base to 64k in three arms, as cope_llama3_8b_64k does it with Llama-3-8B.
cd "$(dirname "$0")/../.."
: "${CLUSTER:=h100_8}" "${NODES:=4}"
. recipes/common.sh

for domain in code_repositories books fineweb_edu fineweb stackexchange wikipedia tulu_v2 arxiv openwebmath textbooks; do
  given documents "data/text/$domain" "the texts of this domain"
done
stage data_prep/prepare.py corpus=mixture_64k corpus.tokenizer=Qwen/Qwen3-8B-Base output=data/qwen3_8b_64k \
  'sequence_lengths=[65536]'
heldout=data/qwen3_8b_64k/heldout

runs=()
for arm in rope hardclip20 cope20; do
  run=outputs/qwen3_8b_64k_$arm
  train +experiment=qwen3_8b_64k rope="$arm"
  stage scripts/export.py checkpoint="$run" verify=false
  evaluate checkpoint="$run/export" output="$run/evaluation" documents="$heldout" \
    'lengths=[8192,16384,32768,65536,131072]' test_time=auto
  evaluate suite=ruler checkpoint="$run/export" output="$run/evaluation" test_time=auto \
    'lengths=[8192,16384,32768,65536,131072]'
  runs+=("$run")
done
stage scripts/compare.py "runs=[$(IFS=, && echo "${runs[*]}")]" baseline=qwen3_8b_64k_rope \
  published=recipes/qwen3_8b_64k/expected.csv output=outputs/qwen3_8b_64k.html title='Qwen3-8B-Base to 64k'
