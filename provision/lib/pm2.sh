#!/usr/bin/env bash
# PM2 with a home of its own, apart from a PM2 of the user.
# Sourced by provision/local; needs $tools.

# PM2 puts sockets into its home, and a socket's path has at most 107 bytes: where the checkout
# is deep, the home is in /tmp.
set_pm2_home() { # directory
  PM2_HOME=$1
  if ((${#PM2_HOME} > 85)); then
    PM2_HOME=/tmp/matinee-pm2-$EUID-$(printf '%s' "$1" | sha256sum | cut -c 1-12)
    (umask 077 && mkdir --parents "$PM2_HOME")
    [[ -O $PM2_HOME ]] || die "$PM2_HOME belongs to another user"
  fi
  export PM2_HOME
}

# Its daemon stays: it must inherit neither the lock (9) nor the output of the steps (3).
pm2() { "$tools/node_modules/.bin/pm2" "$@" 3>&- 9>&-; }

# Without the command pm2, which would start a daemon to answer.
pm2_runs() {
  local pid
  pid=$(cat "$PM2_HOME/pm2.pid" 2>/dev/null) && grep --quiet --text PM2 "/proc/$pid/cmdline" 2>/dev/null
}
