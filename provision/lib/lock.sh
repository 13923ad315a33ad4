#!/usr/bin/env bash
# The lock of the working directory: only one command at a time installs, starts or removes something.
# Sourced by provision/local; needs $work.

# Until this process ends. The second of two that start together waits for the first.
hold_lock() {
  mkdir --parents "$work"
  exec 9>"$work/lock"
  flock --nonblock 9 || {
    echo "another provision/local is running here; waiting until it ends"
    flock 9
  }
}

# For the time of one command.
with_lock() { # command …
  (
    exec 9>"$work/lock"
    flock 9
    "$@"
  )
}
