#!/usr/bin/env bash
# HoPE for video at laptop size: six ways to count and read the positions of a video, each from scratch over SEEDS seeds, then
# V-NIAH to eight times the trained frames. One run a core (PROCESSES); run again, it goes on from what is finished.
# WHEN=1 asks in which quarter the symbol is, too, in training and after it. FILM=FILE takes the haystack's frames from a video
# file (extra video) in place of drawn backgrounds. Either has runs of its own.
cd "$(dirname "$0")/../.."
CLUSTER=laptop NODES=1
. recipes/common.sh
export OMP_NUM_THREADS=1
: "${SEEDS:=2}" "${WHEN:=}" "${FILM:=}"
[ -z "${DRY_RUN:-}" ] || SEEDS=1 # the others differ in nothing that is checked

data=data/hope_video_cpu${WHEN:+_when} name=hope_video_cpu${WHEN:+_when}${FILM:+_film}
out=outputs/$name needles=$data/vniah${FILM:+_film}
arms=(rope1d_video mrope mrope_v5 videorope hope_video_fixed hope_video)

# arm NAME-sSEED: one run, and its needles; HoPE's also with two frames to a position, without training
arm() {
  local run=$1 rope=${1%-s*} factors=
  case $rope in hope_*) factors='vniah.factors=[1.0,0.5]' ;; esac
  train +experiment=hope_video_cpu "rope=$rope" "trainer.seed=${run##*-s}" "run_name=$name/$run" \
    "data.store=$data/packed-256"
  evaluate suite=vniah "checkpoint=$out/$run" "output=$out/$run/evaluation" "vniah.data=$needles" \
    'vniah.frames=[16,32,64,128]' "vniah.questions=[content${WHEN:+,when}]" vniah.samples=16 ${factors:+"$factors"} \
    test_time=none device=cpu dtype=float32
}

[ -z "$FILM" ] || given documents "$FILM" 'a video'
# What is there is kept: neither file is written over
[ -e "$data/packed-256/manifest.json" ] || stage data_prep/prepare_video.py scenes.count=4000 'scenes.frames=[4,16]' \
  "scenes.questions=[content${WHEN:+,time}]" tower.patch_size=4 sequence_length=256 "output=$data"
[ -e "$needles/vniah.safetensors" ] || stage data_prep/prepare_video.py vniah ${FILM:+"film=$FILM"} tower.patch_size=4 \
  "output=$needles"

runs=()
for ((seed = 0; seed < SEEDS; seed++)); do
  for rope in "${arms[@]}"; do runs+=("$rope-s$seed"); done
done
each arm "${runs[@]}"
stage scripts/compare.py "runs=[$(IFS=, && echo "${runs[*]/#/$out/}")]" baseline=mrope-s0 "output=$out/report.html" \
  published=recipes/hope_video_cpu/expected.csv "title='HoPE for video, small'"
