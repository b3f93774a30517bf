#!/usr/bin/env bash
# HoPE's published setting on Qwen2-VL-7B: five arms trained on LLaVA-Video-178K, then V-NIAH to 3,000 frames. Long-video
# benchmarks run in an environment of their own (README).
cd "$(dirname "$0")/../.."
: "${CLUSTER:=h100_8}" "${NODES:=1}"
. recipes/common.sh

: "${VIDEOS:=data/llava_video/visuals.jsonl}" "${START:=data/hope_qwen2vl_7b/start}"
: "${FILM:=data/vniah/haystack.mp4}" "${NEEDLES:=data/vniah/needles.jsonl}"
given documents "$VIDEOS" "the videos' questions and answers, a line each"
given model "$START" "Qwen2-7B under Qwen2-VL-7B's tower"
given documents "$FILM" "a film of an hour"
given documents "$NEEDLES" "V-NIAH's images and questions, a line each"

data=data/hope_qwen2vl_7b
[ -e "$data/packed-8200/manifest.json" ] ||
  stage data_prep/prepare_video.py "visuals=$VIDEOS" "tokenizer=$START" sequence_length=8200 "output=$data"
[ -e "$data/vniah/vniah.safetensors" ] ||
  stage data_prep/prepare_video.py vniah "film=$FILM" "needles=$NEEDLES" height=9 width=16 frames=3000 \
    "output=$data/vniah"

runs=()
for arm in rope1d_video mrope mrope_v5 videorope hope_video; do
  run=outputs/hope_qwen2vl_7b_$arm factors=
  case $arm in hope_video) factors='vniah.factors=[0.5,0.75,1.0]' ;; esac
  train +experiment=hope_qwen2vl_7b rope="$arm" "model.path=$START"
  stage scripts/export.py checkpoint="$run" verify=false
  evaluate suite=vniah checkpoint="$run/export" output="$run/evaluation" "vniah.data=$data/vniah" \
    'vniah.frames=[100,500,1000,1500,2000,2500,3000]' 'vniah.depths=[0.0,0.2,0.4,0.6,0.8,1.0]' ${factors:+"$factors"} \
    test_time=none
  runs+=("$run")
done
stage scripts/compare.py "runs=[$(IFS=, && echo "${runs[*]}")]" baseline=hope_qwen2vl_7b_mrope \
  published=recipes/hope_qwen2vl_7b/expected.csv output=outputs/hope_qwen2vl_7b.html title="'HoPE on Qwen2-VL-7B'"
