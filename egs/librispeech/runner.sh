# What the recipes share, second part: runs stages and their programs, one after the other or side by side, and stops
# them. Sourced by common.sh, which says what a recipe has to set.

current_stage="" current_name="" stage_log="" child=""
queue=()                 # STAGE:PHASE, still to be trained
declare -A running=()    # process id -> phase of the trainings that run side by side
is_beside=0              # 1 in those processes

is_asked() { [ "$1" -ge "$stage" ] && [ "$1" -le "$stop_stage" ]; }

# run_stage NUMBER NAME MARK FINGERPRINT FUNCTION [ARGUMENT...]
# Calls FUNCTION unless MARK says that it ended well with this FINGERPRINT, which holds every option that matters. With
# another fingerprint the stage runs again, and FUNCTION finds redo=1, as with --force: earlier output is no use then.
# Without a MARK the stage always runs.
run_stage() {
  local mark=$3 start
  is_asked "$1" || return 0
  redo=$force
  if [ -n "$mark" ] && [ -e "$mark" ]; then
    if [ "$(sed '$d' "$mark")" != "$4" ]; then
      log "Stage $1: $2: its options changed, so it runs again"
      redo=1
    elif [ "$force" = 0 ]; then
      log "Stage $1: $2: done already (--force runs it again)"
      return 0
    fi
  fi
  rm -f ${mark:+"$mark"}
  current_stage=$1 current_name=$2 stage_log=""
  start=$(date +%s.%N)
  # On a terminal the output stays there, because tqdm's bars need one; elsewhere it goes to a log file as well. Lines
  # of trainings that run side by side begin with the phase.
  if [ "$is_beside" = 1 ] || [ ! -t 2 ]; then
    stage_log=$exp_root/log/stage-$1-${2// /-}.log
    exec 3>&1 4>&2
    if [ "$is_beside" = 1 ]; then
      exec > >(trap '' INT TERM HUP; tee "$stage_log" | sed -u "s/^/$2: /") 2>&1
    else
      exec > >(trap '' INT TERM HUP; exec tee "$stage_log") 2>&1
    fi
    tee_pid=$!
  fi
  log "Stage $1: $2"
  "${@:5}"
  log "Stage $1: done in $(elapsed_since "$start") s"
  end_stage_log
  if [ -n "$mark" ]; then
    printf '%s\nended %s\n' "$4" "$(date +%s.%N)" >"$mark.tmp"
    mv "$mark.tmp" "$mark"
  fi
  printf '{"stage": %d, "name": "%s", "seconds": %s}\n' "$1" "$2" "$(elapsed_since "$start")" >>"$exp_root/stages.jsonl"
  current_stage=""
}

elapsed_since() { awk -v a="$1" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }'; }

# Gives the output back to where it went before the stage, and waits until tee has written all of it.
end_stage_log() {
  [ -n "$stage_log" ] || return 0
  exec >&3 2>&4 3>&- 4>&-
  wait "$tee_pid" || true
}

# Runs a program of the stage, shown first. In the background with wait, because bash handles a signal only after a
# foreground program has ended: a SIGTERM or Ctrl-C should reach the program, which then saves what it has.
run() {
  local status=0 shown="+" word
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./=:,+-]+$ ]] || word="'$word'"
    shown+=" $word"
  done
  echo "$shown" >&2
  "$@" </dev/null &
  child=$!
  wait "$child" || status=$?
  child=""
  return "$status"
}

# The second Ctrl-C does not wait. Worker processes that outlive the program they belong to are ended too.
on_signal() {
  local workers
  trap '' TERM HUP
  trap kill_now INT
  stop_running
  if [ -n "$child" ]; then
    workers=$(pgrep -P "$child" 2>/dev/null || true)
    kill -TERM "$child" 2>/dev/null || true
    wait "$child" || true
    [ -z "$workers" ] || kill -TERM $workers 2>/dev/null || true
  fi
  exit 143
}

kill_now() {
  local pid
  for pid in $child "${!running[@]}"; do
    pkill -KILL -P "$pid" 2>/dev/null || true
    kill -KILL "$pid" 2>/dev/null || true
  done
  exit 137
}

# Asks the trainings that run side by side to save what they have, and waits for them.
stop_running() {
  local pid
  for pid in "${!running[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${!running[@]}"; do wait "$pid" || true; done
}

on_exit() {
  local status=$?
  trap - EXIT
  [ "$status" -ne 0 ] && [ -n "$current_stage" ] || exit "$status"
  end_stage_log
  local what="failed"
  case $status in 130 | 143) what="was stopped" ;; esac
  local next="The same command goes on from here; --force starts the stage anew."
  [ "$force" = 0 ] || next="The same command without --force goes on from here; with it the stage starts anew."
  echo "$(date '+%Y-%m-%d %H:%M:%S') ERROR stage $current_stage ($current_name) $what (status $status)." \
    "${stage_log:+Its output is in $stage_log. }$next" >&2
  exit "$status"
}

trap on_exit EXIT
trap on_signal INT TERM HUP

# --- Trainings, side by side where they can be ------------------------------------------------------------------------

# Queues the phases $2... of stage $1, those of them that were asked for.
train_stage() {
  local phase
  is_asked "$1" || return 0
  for phase in "${@:2}"; do
    [[ " $phases " != *" $phase "* ]] || queue+=("$1:$phase")
  done
}

# Trains what is queued: one after the other, or up to $jobs at once, each as soon as nothing that it is made from is
# queued before it or running; they share the cores. When one fails the others save what they have and stop.
train_queued() {
  local item phase left sharing
  while [ "${#queue[@]}" -gt 0 ] || [ "${#running[@]}" -gt 0 ]; do
    left=()
    for item in ${queue[@]+"${queue[@]}"}; do
      phase=${item#*:}
      if [ "$jobs" = 1 ]; then
        train_now "${item%%:*}" "$phase"
      elif [ "${#running[@]}" -lt "$jobs" ] && ! has_parent_in "$phase" "${left[*]-} ${running[*]-}"; then
        sharing=1
        if [ "${#running[@]}" -gt 0 ] || can_join "$phase"; then sharing=$jobs; fi
        train_beside "$sharing" "${item%%:*}" "$phase" &
        running[$!]=$phase
      else
        left+=("$item")
      fi
    done
    queue=(${left[@]+"${left[@]}"})
    [ "${#running[@]}" = 0 ] || look_after_running
  done
}
# Waits a moment; takes those that have ended out of `running`.
look_after_running() {
  local pid
  sleep 0.2 # wait -n does not say who has ended before bash 5.1
  for pid in "${!running[@]}"; do
    kill -0 "$pid" 2>/dev/null && continue
    unset "running[$pid]"
    wait "$pid" || stop_with "$?"
  done
}
stop_with() {
  stop_running
  exit "$1"
}
# train_now "${@:2}" in a process of its own, one of $1 that share the cores.
train_beside() {
  trap on_exit EXIT
  trap on_signal INT TERM HUP
  is_beside=1 running=() current_stage=""
  share_cores "$((nproc * $1))"
  train_now "${@:2}"
}
train_now() {
  run_stage "$1" "$2" "$exp_root/$2/.done" "$(phase_fingerprint "$2"; dependencies "$2")" train "$2"
}
# Whether any queued phase could be trained beside $1: a phase that all others wait for gets all cores.
can_join() {
  local item
  for item in "${queue[@]}"; do
    [ "${item#*:}" = "$1" ] || has_parent_in "${item#*:}" "${queue[*]}" || return 0
  done
  return 1
}
# Whether a phase that $1 is made from is among the words $2, which may be STAGE:PHASE.
has_parent_in() {
  local other
  for other in $(parents "$1"); do
    [[ " ${2//:/ } " != *" $other "* ]] || return 0
  done
  return 1
}
