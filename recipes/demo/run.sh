#!/usr/bin/env bash
# The whole path at laptop size: prepare, pretrain, extend three arms, export, evaluate with and without YaRN, compare.
# About six minutes on two CPU cores. Run again, it goes on from what is finished.
cd "$(dirname "$0")/../.."
CLUSTER=laptop NODES=1
. recipes/common.sh

arms=(rope hardclip cope)
runs=(base "${arms[@]}")

stage data_prep/prepare.py corpus=demo 'sequence_lengths=[128,512]'

train +experiment=demo/pretrain
stage scripts/export.py checkpoint=outputs/demo/base verify=false

for arm in "${arms[@]}"; do
  train +experiment="demo/$arm"
done
# One arm is proved against stock transformers; the others' files are held to their checksums.
stage scripts/export.py checkpoint=outputs/demo/cope
for arm in rope hardclip; do
  stage scripts/export.py checkpoint="outputs/demo/$arm" verify=false
done

evaluate runs "${runs[@]/#/outputs/demo/}" documents=data/demo/heldout 'lengths=[128,512,1024,2048,4096]' \
  'test_time=[none,yarn_follow]' device=cpu dtype=float32 needle.names=false needle.samples=8 answers.count=0 \
  compare.baseline=rope compare.published=recipes/demo/expected.csv compare.output=outputs/demo/report.html \
  "compare.title='ropewalk demo'"
