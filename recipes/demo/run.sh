#!/usr/bin/env bash
# The whole path at laptop size: prepare, pretrain, extend three arms, export, evaluate, compare. About ten minutes on
# two CPU cores. Run again, it goes on from what is finished.
cd "$(dirname "$0")/../.."
CLUSTER=laptop NODES=1
. recipes/common.sh

arms=(rope hardclip11 cope11)
runs=(base "${arms[@]}")

stage data_prep/prepare.py corpus=demo 'sequence_lengths=[512,2048]'

train +experiment=demo/pretrain
stage scripts/export.py checkpoint=outputs/demo/base

for arm in "${arms[@]}"; do
  train +experiment="demo/$arm"
  stage scripts/export.py checkpoint="outputs/demo/$arm"
done

for run in "${runs[@]}"; do
  evaluate checkpoint="outputs/demo/$run/export" output="outputs/demo/$run/evaluation" \
    documents=data/demo/heldout 'lengths=[512,1024,2048,4096,8192]' test_time=auto device=cpu dtype=float32 \
    needle.samples=2
done

stage scripts/compare.py "runs=[$(printf 'outputs/demo/%s,' "${runs[@]}" | sed 's/,$//')]" baseline=rope \
  published=recipes/demo/expected.csv output=outputs/demo/report.html title='ropewalk demo'
