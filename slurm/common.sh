# shellcheck shell=bash
# What every job script shares: one task per GPU, their rendezvous, the record, signals and the requeue. Sourced from the
# repository's root. docs/slurm.md tells what happens when.

# A container, if your site wants one: take the comment off one of these two.
container=()    # container=(apptainer exec --nv --bind "$PWD" ropewalk.sif)
srun_options=() # srun_options=(--container-image="$PWD/ropewalk.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" # the latter for an image's Python
# What SLURM calls this job. The last task of an array has the array's own number, which alone means all of its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
job=${job:-${SLURM_JOB_ID:-}}
code=1 warned='' terminated='' job_record='' answer=''
# SLURM warns this script alone (--signal=B:USR1), and run_ranks passes it on. SIGTERM SLURM sends to the ranks, too.
trap 'warned=1' USR1
trap 'terminated=1' TERM

# once COMMAND...: on this node alone, in the container if there is one
once() {
  if [ ${#srun_options[@]} -eq 0 ]; then "${container[@]}" "$@"
  else # the command is told of the whole job's tasks, not of this step's one
    srun --nodes=1 --ntasks=1 --overlap "${srun_options[@]}" env SLURM_NTASKS="$SLURM_NTASKS" "$@"
  fi
}

# patiently COMMAND...: again where slurmctld is too busy to answer
patiently() {
  local wait
  for wait in 2 10 30; do
    "$@" && return
    sleep "$wait"
  done
  "$@"
}

# Ranks meet at the first node, by the address that SLURM itself reaches it at. The port is the job's own.
rendezvous() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$(patiently scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
}

# begin COMMAND OVERRIDES...: everything that must stand before the ranks start. A wrong configuration ends here, with 2.
begin() {
  local settings
  # Threads of a rank's CPU work: more than its cores only take turns, and torch would take all cores of the node.
  export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
  rendezvous
  settings=$(once python scripts/job.py begin "$1" "${@:2}" <"$0") || exit # $0 lies in a spool that no container has
  eval "$settings" # job_record, scratch, and the cluster's variables, quoted by Python
  # On each node's own disk, one directory a job: compilers' caches that ranks of two jobs share corrupt each other, and
  # one on a network disk is slow; a build that was killed leaves a lock that a later job would wait for.
  scratch=$scratch/ropewalk-$SLURM_JOB_ID
  mkdir -p "$scratch"
  export TMPDIR=$scratch TRITON_CACHE_DIR=$scratch/triton TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
  export TORCH_EXTENSIONS_DIR=$scratch/extensions
  export TORCH_FR_DUMP_TEMP_FILE=$job_record/flight-recorder- # NCCL's last collectives, where one has hung
  echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST; record: $job_record"
}

# ranks RECORD SCRIPT ARGUMENTS...: sets $line to what starts them: one task per GPU, by srun, so that a signal reaches the
# ranks themselves
ranks() {
  # --wait: when a rank has ended, the others get five minutes to end by themselves: they agree on most reasons to end,
  # and the first rank may have its tracker to finish.
  # --cpus-per-task: srun takes it from sbatch only where it is said again (SLURM 22.05 and later).
  # GPUs are not bound to tasks, whatever the site says: each rank takes its LOCAL_RANK's, and NVLink between them needs
  # all to be visible.
  line=(srun --kill-on-bad-exit=0 --wait=300 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"
    ${SLURM_GPUS_ON_NODE:+--gpu-bind=none} "${srun_options[@]}"
    "${container[@]}" python -u -m ropewalk.cluster.slurm.rank "$@")
}

# check_machine COMMAND OVERRIDES...: look at the machine before hours are spent on it; what is wrong ends the job, with 3
check_machine() {
  local status=0 line
  ranks "$job_record/doctor" scripts/doctor.py "$@"
  "${line[@]}" || status=$?
  [ "$status" -ne 0 ] || return 0
  code=$((status > 128 ? status : 3))
  finish
}

# run_ranks SCRIPT ARGUMENTS...: run, pass the warning on, and have the ranks' exit code in $code
run_ranks() {
  if [ -n "$warned$terminated" ]; then # the end came before the ranks; nothing to save
    code=75
    return
  fi
  local srun_pid passed_on='' line
  ranks "$job_record" "$@"
  "${line[@]}" & # srun itself, not a shell around it: the signal is for it
  srun_pid=$!
  while kill -0 "$srun_pid" 2>/dev/null; do
    # A signal to a task that has not begun would end it: rank.py notes itself once it holds signals back.
    if [ -n "$warned" ] && [ -z "$passed_on" ] && [ "$(noted_ranks)" -ge "$SLURM_NTASKS" ]; then
      echo "SIGUSR1 to the ranks: they save and leave"
      kill -USR1 "$srun_pid" # srun gives it to every task
      passed_on=1
    fi
    sleep 1 &
    wait $! || true # a trap runs at once in a wait, and only afterwards in a sleep
  done
  code=0
  wait "$srun_pid" || code=$?
}

noted_ranks() { find "$job_record/ranks" -name 'rank-*.json' 2>/dev/null | wc -l; }

# judged_here: the answer where Python cannot be asked, as in an image that srun starts and a job that SLURM is ending
judged_here() {
  if [ "$code" -eq 75 ] && { [ -z "$terminated" ] || [[ $shown == *" Reason=TimeLimit "* ]]; }; then
    echo "requeue saved, to go on; its end could not be recorded"
  else echo "stop its end could not be judged; see the log"; fi
}

# Write the end of the record, and go back into the queue if there is something to go on with.
finish() {
  local shown
  shown=$(patiently scontrol --oneliner show job "$job") || shown=''
  answer=$(once python -m ropewalk.cluster.slurm.job end "$job_record" "$code" \
    ${warned:+--warned} ${terminated:+--terminated} --shown="$shown") ||
    answer=$(judged_here)
  # SLURM starts no step in a job that it is ending
  srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --overlap rm -rf "$scratch" 2>/dev/null || rm -rf "$scratch"
  echo "exit code $code: $answer"
  if [ "${answer%% *}" = requeue ]; then
    patiently scontrol requeue "$job" || {
      answer="stop SLURM does not requeue; the same command again goes on"
      echo "error: ${answer#stop }" >&2
    }
  fi
  [ "$code" -ne 4 ] || exit 0 # an evaluation with NaN is whole, and what waits for it (the comparison) goes on
  exit "$code"
}

# Seconds before the time limit at which a run has to be told: the planner's step and save.
lead_seconds() { once python scripts/plan.py "$@" nodes="$SLURM_NNODES" print=lead_seconds; }

# The instant at which the ranks leave by themselves, should SLURM's warning come late or never; empty where the job has
# no limit, or one too short for that.
leave_by() {
  local lead end
  lead=$(lead_seconds "$@") && [[ $lead =~ ^[0-9]+$ ]] || lead=300
  end=$(date -d "$(squeue --noheader --job="$job" --format=%e)" +%s 2>/dev/null) || return 0
  [ $((end - 2 * lead)) -le "$(date +%s)" ] || echo $((end - lead))
}

# train OVERRIDES...: the whole of a training job; with DRY_RUN=1, outside of one, what it would be
train() {
  local until
  if [ -n "${DRY_RUN:-}" ]; then
    python scripts/job.py preview "slurm/${0##*/}" "$@"
    exit
  fi
  begin train "$@"
  check_machine train "$@"
  until=$(leave_by "$@")
  run_ranks train.py ${until:+trainer.stop_before="$until"} "$@"
  finish
}

# alone COMMAND SCRIPT OVERRIDES...: the whole of a job that trains nothing. What it has finished is on the disk, so near the
# time limit it is ended and put back into the queue.
alone() {
  begin "$1" "${@:3}"
  without_cluster "${@:3}"
  check_machine "$1" "${arguments[@]}"
  run_ranks "$2" "${arguments[@]}"
  finish
}

# with_default OVERRIDE ARGUMENTS...: sets $arguments; OVERRIDE stands unless an argument names another of its kind
with_default() {
  local word
  arguments=("${@:2}")
  for word in "${arguments[@]}"; do
    [ "${word%%=*}" != "${1%%=*}" ] || return 0
  done
  arguments=("$1" "${arguments[@]}")
}

# without_cluster ARGUMENTS...: sets $arguments to those that are not of the cluster group, which training alone has
without_cluster() {
  local word
  arguments=()
  for word in "$@"; do
    [[ $word =~ ^[+~]*cluster[.=] ]] || arguments+=("$word")
  done
}

# sweep_task FOLDER: one combination of hydra/launcher=slurm, and the whole of its batch script: it exits, so that the srun
# line which submitit has put after it is not reached
sweep_task() {
  set -euo pipefail
  local said
  sweep_folder=$1
  trap 'end_sweep_task "$?"' EXIT
  said=$(once python -m ropewalk.cluster.slurm.sweep overrides "$sweep_folder") || exit
  eval "arguments=($said)" # quoted by Python
  train "${arguments[@]}"
}

# end_sweep_task CODE: the launcher waits to hear of every job that does not come back
end_sweep_task() {
  [ -n "$answer" ] || [ -z "$terminated" ] || answer='requeued, perhaps: SLURM ended it before its ranks began'
  once python -m ropewalk.cluster.slurm.sweep end "$sweep_folder" "$1" "$answer" || true
}
