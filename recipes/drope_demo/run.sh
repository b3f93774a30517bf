#!/usr/bin/env bash
# DroPE at laptop size: a base trained with rotation, then recalibrated at its own length without it (and, as the control,
# with it), tried past that length, then continued at four times the length. Run again, it goes on from what is finished.
cd "$(dirname "$0")/../.."
CLUSTER=laptop NODES=1
. recipes/common.sh

stage data_prep/prepare.py corpus=demo 'sequence_lengths=[128,512]'

train +experiment=demo/pretrain
stage scripts/export.py checkpoint=outputs/demo/base verify=false

train +experiment=drope/recalibrate rope=native
train +experiment=drope/recalibrate rope=drope
for arm in rope drope; do
  train +experiment=drope/extend "start_from.run=outputs/drope/$arm" "run_name=drope/${arm}_512"
done
# One export is proved against stock transformers.
stage scripts/export.py checkpoint=outputs/drope/drope
for run in rope rope_512 drope_512; do
  stage scripts/export.py checkpoint="outputs/drope/$run" verify=false
done

evaluate runs outputs/drope/rope outputs/drope/drope outputs/drope/rope_512 outputs/drope/drope_512 \
  documents=data/demo/heldout 'lengths=[128,256,512,1024,2048]' 'test_time=[none,yarn_follow]' device=cpu dtype=float32 \
  needle.names=false needle.samples=8 answers.count=0 compare.baseline=rope \
  compare.published=recipes/drope_demo/expected.csv compare.output=outputs/drope/report.html "compare.title='DroPE, small'"
