#!/usr/bin/env bash
# Runs one command on a worker, again and again until it has succeeded. scripts/launch.py calls it on each worker, in
# the folder of the project:
#
#   worker.sh prune                  deletes files sent before that are no longer part of the code
#   worker.sh install NAME...        makes .venv from requirements/NAME.in; cuda adds JAX for NVIDIA GPUs
#   worker.sh start NAME COMMAND...  starts the command in the background, unless it runs
#   worker.sh status NAME            prints one of: running, finished, stopped, failed CODE, gone
#   worker.sh logs NAME LINES        prints the end of its output
#   worker.sh stop NAME              sends SIGTERM and waits for the end: training saves a checkpoint
#
# Files of a launch: runs/launch/NAME/worker[-JAX_PROCESS_ID].{log,pid,code,lock}. The lock is held as long as the loop
# or the command lives, so a reboot or kill -9 releases it.
set -euo pipefail

# A failed attempt that was shorter is counted; a longer one, or a signal from outside, starts the count anew.
readonly SHORT=600   # seconds
readonly MAX_FAILURES=${LAUNCH_MAX_FAILURES:-5}
readonly PAUSE=${LAUNCH_PAUSE:-15}   # seconds between two attempts

say() { echo "launch: $(date -u +%FT%TZ) $*"; }
fail() { echo "error: $(hostname): $*" >&2; exit 1; }

use_state_of() {
  mkdir -p "runs/launch/$1"
  state="runs/launch/$1/worker${JAX_PROCESS_ID:+-$JAX_PROCESS_ID}"
}

prune() {
  if [[ -f .launch_files ]]; then
    comm -23 <(sort .launch_files) <(sort .launch_files.new) | while IFS= read -r file; do rm -f -- "$file"; done
  fi
  mv .launch_files.new .launch_files
  echo "launch-state: sent"
}

# Prints a Python that can make the environment; nothing if there is none.
find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c \
      'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

# Images of TPU VMs have Python 3.10 (Ubuntu 22.04). uv, from PyPI, brings a Python 3.11 of its own, without root.
make_environment() {
  local python uv
  if .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    return
  fi
  python=$(find_python)
  if [[ -n $python ]]; then
    "$python" -m venv --clear .venv
    return
  fi
  uv=$(command -v uv || true)
  if [[ -z $uv ]]; then
    python3 -m pip install --quiet --user uv || fail "no Python 3.11 or 3.12 with venv, and pip cannot install uv"
    uv=$(python3 -c 'import uv; print(uv.find_uv_bin())')
  fi
  "$uv" venv --quiet --clear --seed --python 3.11 .venv
}

install() {
  # test.txt pins all requirements so that they fit each other; compile.txt and gcs.txt do not agree on all versions.
  local name wanted arguments=(--constraint requirements/test.txt)
  for name in "$@"; do
    if [[ $name == cuda ]]; then
      arguments+=('jax[cuda12]')
    else
      [[ -f requirements/$name.in ]] || fail "--install: there is no requirements/$name.in"
      arguments+=(--requirement "requirements/$name.in")
    fi
  done
  wanted="$* $(cat requirements/*.in requirements/*.txt | sha256sum)"
  if [[ ! -f .venv/.launch_installed || $(<.venv/.launch_installed) != "$wanted" ]]; then
    make_environment
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${arguments[@]}" || fail "pip install failed"
    echo "$wanted" >.venv/.launch_installed
  fi
  echo "launch-state: installed"
}

start() {
  use_state_of "$1"
  exec 9>>"$state.lock"
  if ! flock --nonblock 9; then
    echo "launch-state: running"
    return
  fi
  rm -f "$state.code"
  # The background loop inherits the lock. `setsid`: the end of the connection must not end it.
  setsid bash "$0" loop "$@" </dev/null >>"$state.log" 2>&1 &
  echo "launch-state: running"
}

loop() {
  local child='' stopping='' failures=0 code begun
  use_state_of "$1"
  shift
  echo $$ >"$state.pid"
  if [[ -d .venv/bin ]]; then
    export PATH="$PWD/.venv/bin:$PATH"
  fi
  trap 'stopping=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
  trap '' HUP
  while true; do
    begun=$SECONDS
    say "starts on $(hostname)"
    "$@" &
    child=$!
    # `wait` returns early when the trap runs.
    while true; do
      code=0
      wait "$child" || code=$?
      [[ -n $(jobs -pr) ]] || break
    done
    child=''
    say "ended with exit code $code after $((SECONDS - begun)) s"
    if ((code == 0)); then
      echo 0 >"$state.code"
      return
    fi
    if [[ -z $stopping ]]; then
      if ((code > 128 || SECONDS - begun >= SHORT)); then failures=0; else failures=$((failures + 1)); fi
      if ((failures >= MAX_FAILURES)); then
        say "gives up: $failures attempts in a row failed within $SHORT s"
        echo "$code" >"$state.code"
        return
      fi
      sleep "$PAUSE" &
      wait $! || true   # a `sleep` in the foreground would hold back the trap
    fi
    if [[ -n $stopping ]]; then
      echo stopped >"$state.code"
      return
    fi
  done
}

is_running() { ! flock --nonblock --conflict-exit-code 9 "$state.lock" true; }

status() {
  use_state_of "$1"
  local result=gone code
  if is_running; then
    result=running
  elif [[ -f $state.code ]]; then
    code=$(<"$state.code")
    case $code in
      0) result=finished ;;
      stopped) result=stopped ;;
      *) result="failed $code" ;;
    esac
  fi
  echo "launch-state: $result"
}

logs() {
  use_state_of "$1"
  tail -n "$2" "$state.log" 2>/dev/null || echo "no output yet: $state.log"
}

stop() {
  use_state_of "$1"
  if is_running; then
    # If the loop itself was killed, the command is what is left of its group.
    kill -TERM "$(<"$state.pid")" 2>/dev/null || kill -TERM -- "-$(<"$state.pid")"
    flock --timeout 600 "$state.lock" true || fail "still running 600 s after SIGTERM"
  fi
  status "$1"
}

case ${1-} in
  prune | install | start | loop | status | logs | stop) "$@" ;;
  *) fail "worker.sh ${1-}: unknown action" ;;
esac
