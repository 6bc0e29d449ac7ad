#!/usr/bin/env bash
# The batch script of a SLURM job: slurm_job.sh COMMAND... runs the command in every task of the job. Submitted by
# `scripts/launch.py slurm`, whose flags of sbatch it relies on: --requeue and --signal=B:USR1@SECONDS.
#
#   dead node            SLURM itself queues the job again (--requeue)
#   preemption           the tasks get SIGTERM, save and end with 143; the job is queued again
#   time limit near      SLURM sends USR1 to this script, which sends SIGTERM to the tasks; the job is queued again
#   the command fails    it is started again in the same allocation; after 5 failures within 600 s each the job fails
#   launch.py ... stop   the tasks get SIGTERM, save and end; the file runs/launch/NAME/stopped says that this was meant
#   scancel              the tasks get SIGTERM, and KillWait seconds later SIGKILL; nothing is started again
set -uo pipefail

readonly SHORT=600
readonly MAX_FAILURES=${LAUNCH_MAX_FAILURES:-5}
readonly PAUSE=${LAUNCH_PAUSE:-15}
# All tasks of an array have this form; the first one's SLURM_JOB_ID alone would mean the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-${SLURM_JOB_ID:?"not started by sbatch"}}
readonly stopped=runs/launch/${SLURM_JOB_NAME:?"not started by sbatch"}/stopped
step='' ending='' failures=0

say() { echo "launch: $(date -u +%FT%TZ) job $job: $*"; }
end_step() { [[ -z $step ]] || kill -TERM "$step" 2>/dev/null; }   # srun forwards it to all tasks
trap 'ending=1; end_step' USR1 TERM

# Ends the script, and has the job queued again unless the user has stopped it. "Incomplete" leaves out a cancelled job.
finish() {
  if [[ -f $stopped ]]; then
    say "stopped; it is not queued again"
  else
    say "is queued again"
    scontrol requeue Incomplete "$job"
  fi
  exit 143
}

if [[ -d .venv/bin ]]; then
  export PATH="$PWD/.venv/bin:$PATH"
fi
if [[ -f $stopped ]]; then
  finish
fi
while true; do
  begun=$SECONDS
  say "starts on ${SLURM_JOB_NODELIST:-$(hostname)}"
  # srun has not taken over --cpus-per-task from sbatch since SLURM 22.05.
  srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$@" &
  step=$!
  # `wait` returns early when a trap runs.
  while true; do
    wait "$step"
    code=$?
    [[ -n $(jobs -pr) ]] || break
  done
  step=''
  say "ended with exit code $code after $((SECONDS - begun)) s"
  if ((code == 0)); then
    exit 0
  elif [[ -n $ending ]] || ((code == 143)); then
    finish
  fi
  if ((SECONDS - begun >= SHORT)); then failures=0; else failures=$((failures + 1)); fi
  if ((failures >= MAX_FAILURES)); then
    say "gives up: $failures attempts in a row failed within $SHORT s"
    exit "$code"
  fi
  sleep "$PAUSE" &
  wait $!   # a `sleep` in the foreground would hold back the traps
  if [[ -n $ending ]]; then
    finish
  fi
done
