#!/usr/bin/env bash
# Numbered steps, one line each: what a step prints goes to a log, and only a failed step shows its end.
# Sourced by provision/local; needs $work.

begin() { # number of steps
  steps=$1 step_number=0 step_title='' step_hint='' log=$work/up.log
  mkdir --parents "$work"
  : >"$log"
  exec 3>&1
  trap step_failed EXIT
}

# Runs a function with its output in the log. On a terminal, the seconds are counted meanwhile.
step() { # title, function, hint for when it fails
  local started=$EPOCHREALTIME ticker=''
  step_number=$((step_number + 1)) step_title=$1 step_hint=$3
  step_line="[$step_number/$steps] $1 …"
  printf '%s' "$step_line" >&3
  printf '\n=== %s\n' "$step_line" >>"$log"
  step_from=$(wc -l <"$log")
  if [[ -t 3 ]]; then
    (
      while sleep 1; do printf '\r%s %d s ' "$step_line" $((${EPOCHREALTIME%.*} - ${started%.*})) >&3; done
    ) </dev/null >/dev/null 2>&1 9>&- &
    ticker=$! step_ticker=$!
  fi
  "$2" >>"$log" 2>&1
  [[ -z $ticker ]] || { kill "$ticker" && wait "$ticker" 2>/dev/null; } || true
  step_title='' step_ticker=''
  [[ ! -t 3 ]] || printf '\r%s' "$step_line" >&3
  printf ' %s s   \n' "$(seconds_since "$started")" >&3
  # What the user must know although the step succeeded.
  tail --lines "+$((step_from + 1))" "$log" | sed --quiet 's/^NOTE: /      /p' >&3
}

# Called at every exit. After a failed step it shows which step it was, the end of the log, and the hint.
step_failed() {
  local code=$?
  [[ -z ${step_ticker-} ]] || kill "$step_ticker" 2>/dev/null || true
  [[ -n ${step_title-} ]] || return 0
  {
    printf ' FAILED\n\n'
    tail --lines "+$((step_from + 1))" "$log" | tail -n 20 | sed 's/^/    /'
    printf '\nstep %s of %s failed: %s\n  whole log: %s\n  hint:      %s\n' \
      "$step_number" "$steps" "$step_title" "$log" "$step_hint"
  } >&3
  exit "$code"
}

seconds_since() { # a value of EPOCHREALTIME
  local now=$EPOCHREALTIME us
  us=$((${now/[.,]/} - ${1/[.,]/}))
  printf '%d.%d' $((us / 1000000)) $((us % 1000000 / 100000))
}
