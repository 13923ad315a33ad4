#!/usr/bin/env bash
# What every script needs first: the settings of .env, error messages, and a look at ports.
# Sourced before the other files of lib/.

# The same in every locale: in a Turkish one, for example, the capital of i is not I.
export LC_ALL=C.UTF-8
# With CDPATH, cd prints the directory and may choose another one. systemd's timers set no HOME.
unset CDPATH
export HOME=${HOME:-$(getent passwd "$EUID" | cut --delimiter : --fields 6)}
# The variables of libpq and dbmate would lead psql, pg_dump and dbmate to another server or table, or
# change their output. These four of libpq are set wherever a script connects; DBMATE is our own.
for name in "${!PG@}" "${!DBMATE_@}"; do
  case $name in PGHOST | PGPORT | PGUSER | PGPASSWORD) ;; *) unset "$name" ;; esac
done
unset name

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)

die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  shift
  if (($#)); then printf '  %s\n' "$@" >&2; fi
  exit 1
}

# Without ~/.curlrc, whose options change the output.
curl() { command curl --disable "$@"; }

# Exports the variables of .env; one that is set in the environment keeps that value. The services, PM2's
# ecosystem file and the Vagrantfile read the file by the same rule, and refuse the same lines.
load_settings() {
  local line number=0 name file=${MATINEE_ENV_FILE:-$root/.env}
  local -A line_of=()
  [[ -r $file ]] || die "cannot read $file"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    if ((number == 1)) && [[ $line == $'\xef\xbb\xbf'* ]]; then
      die "$file: line 1 begins with a byte order mark" "save the file without it"
    fi
    [[ -n ${line//[ $'\t']/} && $line != '#'* ]] || continue
    # The line is not shown: it may hold a password.
    [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] \
      || die "$file: line $number is not NAME=value" "no \"export\", no space before \"=\""
    name=${BASH_REMATCH[1]}
    [[ -z ${line_of[$name]-} ]] || die "$file: line $number sets $name again, which line ${line_of[$name]} sets"
    line_of[$name]=$number
    if [[ -z ${!name+set} ]]; then export "$name=${BASH_REMATCH[2]}"; else export "${name?}"; fi
  done <"$file"
}

# For the parts of a URL: every byte that is not unreserved becomes %XX.
url_encoded() {
  local LC_ALL=C text=$1 out='' i char
  for ((i = 0; i < ${#text}; i++)); do
    char=${text:i:1}
    case $char in
      [A-Za-z0-9._~-]) out+=$char ;;
      *) out+=$(printf '%%%02X' "'$char") ;;
    esac
  done
  printf '%s' "$out"
}

# Dies naming every variable that is missing or empty.
require() {
  local name missing=()
  for name; do [[ -n ${!name-} ]] || missing+=("$name"); done
  ((${#missing[@]} == 0)) || die "not set: ${missing[*]}" "they belong in $root/.env"
}

# The process that listens on a TCP port of an address, as "name (process 123)"; nothing where it is free.
# A listener on every address counts for each address, and so does a port wanted on every address.
listener() { # port, address (every address by default)
  local line local_address wanted=${2-}
  wanted=${wanted#[}
  wanted=${wanted%]}
  while read -r line; do
    local_address=$(awk '{print $4}' <<<"$line")
    local_address=${local_address%:*}
    local_address=${local_address#[}
    local_address=${local_address%]}
    local_address=${local_address#::ffff:}
    case $wanted in '' | 0.0.0.0 | ::) ;; *) [[ $local_address =~ ^(\*|0\.0\.0\.0|::)$ || $local_address == "$wanted" ]] || continue ;; esac
    if [[ $line =~ \(\(\"([^\"]+)\",pid=([0-9]+) ]]; then
      printf '%s (process %s)\n' "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
    else
      printf 'a process of another user\n'
    fi
    return 0
  done < <(ss --listening --tcp --numeric --processes --no-header "sport = :$1" 2>/dev/null)
}
