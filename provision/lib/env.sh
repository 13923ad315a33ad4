#!/usr/bin/env bash
# What every script here needs first: the settings of .env, and a way to fail.
# Sourced, never run: . "$(dirname "${BASH_SOURCE[0]}")/env.sh"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)

die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  shift
  if (($#)); then printf '  %s\n' "$@" >&2; fi
  exit 1
}

# Exports what .env says; a variable that is already set wins.
load_settings() {
  local line file=${MATINEE_ENV_FILE:-$root/.env}
  [[ -r $file ]] || die "cannot read $file"
  while IFS= read -r line || [[ -n $line ]]; do
    line=${line%$'\r'}
    [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] || continue
    if [[ -z ${!BASH_REMATCH[1]+set} ]]; then
      export "${BASH_REMATCH[1]}=${BASH_REMATCH[2]}"
    else
      export "${BASH_REMATCH[1]?}"
    fi
  done <"$file"
}

# Dies naming every one that is missing or empty.
require() {
  local name missing=()
  for name; do [[ -n ${!name-} ]] || missing+=("$name"); done
  ((${#missing[@]} == 0)) || die "not set: ${missing[*]}" "they belong in $root/.env"
}

# Who listens on a TCP port, as "name (process 123)"; nothing when nobody does.
listener() {
  local line
  line=$(ss --listening --tcp --numeric --processes --no-header "sport = :$1" 2>/dev/null | head -n 1)
  [[ -n $line ]] || return 0
  if [[ $line =~ \(\(\"([^\"]+)\",pid=([0-9]+) ]]; then
    printf '%s (process %s)\n' "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
  else
    printf 'a process of another user\n'
  fi
}
