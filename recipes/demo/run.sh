#!/usr/bin/env bash
# The whole path at laptop size: prepare, pretrain, extend three arms, export, evaluate with and without YaRN, compare.
# About eight minutes on two CPU cores. Run again, it goes on from what is finished.
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

for run in "${runs[@]}"; do
  evaluate checkpoint="outputs/demo/$run" output="outputs/demo/$run/evaluation" documents=data/demo/heldout \
    'lengths=[128,512,1024,2048,4096]' 'test_time=[none,yarn_follow]' device=cpu dtype=float32 \
    needle.names=false needle.samples=8 answers.count=0
done

stage scripts/compare.py "runs=[$(printf 'outputs/demo/%s,' "${runs[@]}" | sed 's/,$//')]" baseline=rope \
  published=recipes/demo/expected.csv output=outputs/demo/report.html title='ropewalk demo'
