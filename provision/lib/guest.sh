#!/usr/bin/env bash
# What the scripts that run inside a VM share: changing only what differs, and saying so.
# Sourced, never run: . "$here/guest.sh"

# The settings come by the environment: no file in a VM holds those of another service.
export MATINEE_ENV_FILE=/dev/null DEBIAN_FRONTEND=noninteractive
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
. "$(dirname "${BASH_SOURCE[0]}")/services.sh"

# shellcheck disable=SC2034 # used by those who source this
home=/opt/matinee
# What provision/build made: on the host, or where there was nothing, in this machine.
dist=$root/dist
[[ -e $dist/SHA256SUMS ]] || dist=/var/lib/matinee/dist

# Notes a change: for the reader, for the last line, and for the script, which compares $changes.
changes=0
changed() {
  changes=$((changes + 1))
  printf '  changed: %s\n' "$1"
  printf '%s\n' "$1" >>"${CHANGES:-/dev/null}"
}

# Writes its input to a file, if that is not there already.
put() { # path, mode, owner:group
  local new
  new=$(mktemp)
  cat >"$new"
  put_file "$new" "$@"
  rm --force "$new"
}

put_file() { # source, path, mode, owner:group
  local owner=${4:-root:root}
  if ! cmp --silent "$1" "$2"; then
    # Written beside it and then renamed: a running program keeps its file, and no half file is read.
    install -D --mode "$3" --owner "${owner%:*}" --group "${owner#*:}" "$1" "$2.new"
    mv --force "$2.new" "$2"
    changed "$2"
  elif [[ "$(stat --format '%a %U:%G' "$2")" != "${3#0} $owner" ]]; then
    chmod "$3" "$2"
    chown "$owner" "$2"
    changed "$2"
  fi
}

# Installs what is missing. Services that a package brings do not start before they are configured.
packages() {
  local name missing=() policy=/usr/sbin/policy-rc.d ours=''
  for name; do
    installed "$name" || missing+=("$name")
  done
  ((${#missing[@]})) || return 0
  apt_get update
  if [[ ! -e $policy ]]; then
    ours=yes
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 0755 "$policy"
  fi
  apt_get install --no-install-recommends "${missing[@]}" || { [[ -z $ours ]] || rm "$policy"; die "apt-get cannot install ${missing[*]}"; }
  [[ -z $ours ]] || rm "$policy"
  changed "packages: ${missing[*]}"
}

installed() { [[ "$(dpkg-query --show --showformat '${db:Status-Status}' "$1" 2>/dev/null)" == installed ]]; }

# Waits where the machine's own update is at work; says something only when it fails.
apt_get() {
  local output
  output=$(apt-get --quiet=2 --yes --option DPkg::Lock::Timeout=600 --option Dpkg::Use-Pty=0 "$@" </dev/null 2>&1) \
    || { printf '%s\n' "$output" | tail -n 20 >&2 && return 1; }
}

# A unit that runs now and at each boot.
enable_unit() {
  local name
  for name; do
    if ! systemctl --quiet is-enabled "$name" 2>/dev/null || ! systemctl --quiet is-active "$name"; then
      systemctl enable --quiet --now "$name"
      changed "$name enabled"
    fi
  done
}

# Until a command succeeds.
await() { # seconds, what, command …
  local deadline=$((SECONDS + $1))
  until "${@:3}"; do
    ((SECONDS < deadline)) || die "$2: not within $1 s"
    sleep 0.5
  done
}
