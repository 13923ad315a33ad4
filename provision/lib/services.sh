#!/usr/bin/env bash
# The table of services, provision/services, as functions; reading it checks every row.
# Sourced after env.sh; needs $root.
# shellcheck disable=SC2154 # $root is of env.sh

# services                     the names, in the order of the table
# services_with COLUMN         those whose column is not "-"
# services_on MACHINE          those that run on a machine
# machines                     each machine once, in the order of the table
# service_field NAME COLUMN    what the column says; nothing for "-"
# callers_of NAME, callees_of NAME
# setting_name NAME SUFFIX     the variable of .env: setting_name inventory PORT prints INVENTORY_PORT
# setting NAME SUFFIX          the value of that variable; nothing where it is not set
# service_url NAME             http://host:port, for a client on the same machine
# is_service NAME              succeeds for a name of the table
#
# Lists are printed one a line. The names have no blanks: `for name in $(services)` is safe.

service_names=()
# By "NAME COLUMN".
declare -A service_fields=()

services() { printf '%s\n' "${service_names[@]}"; }

services_with() { # column
  local name
  require_column "$1"
  for name in "${service_names[@]}"; do
    [[ ${service_fields[$name $1]} == - ]] || printf '%s\n' "$name"
  done
}

services_on() { # machine
  local name
  for name in "${service_names[@]}"; do
    [[ ${service_fields[$name machine]} != "$1" ]] || printf '%s\n' "$name"
  done
}

machines() {
  local name machine seen=' '
  for name in "${service_names[@]}"; do
    machine=${service_fields[$name machine]}
    [[ $seen != *" $machine "* ]] || continue
    seen+="$machine "
    printf '%s\n' "$machine"
  done
}

service_field() { # name, column
  require_service "$1"
  require_column "$2"
  [[ ${service_fields[$1 $2]} == - ]] || printf '%s\n' "${service_fields[$1 $2]}"
}

callees_of() { # name
  require_service "$1"
  [[ ${service_fields[$1 calls]} == - ]] || printf '%s\n' "${service_fields[$1 calls]//,/$'\n'}"
}

callers_of() { # name
  local name
  require_service "$1"
  for name in "${service_names[@]}"; do
    [[ ",${service_fields[$name calls]}," != *",$1,"* ]] || printf '%s\n' "$name"
  done
}

# Not by ${name^^}: a Turkish locale makes İ of i.
setting_name() { # name, suffix
  require_service "$1"
  printf '%s_%s\n' "$(LC_ALL=C tr '[:lower:]' '[:upper:]' <<<"$1")" "$2"
}

setting() { # name, suffix
  local variable
  variable=$(setting_name "$1" "$2")
  [[ -z ${!variable-} ]] || printf '%s\n' "${!variable}"
}

# A service that listens on every address is asked on loopback.
service_url() { # name
  local host
  host=$(setting "$1" HOST)
  case $host in
    0.0.0.0) host=127.0.0.1 ;;
    :: | '[::]') host='[::1]' ;;
    \[*) ;;
    *:*) host="[$host]" ;;
  esac
  printf 'http://%s:%s\n' "$host" "$(setting "$1" PORT)"
}

is_service() { [[ -n ${service_fields[$1 service]-} ]]; }

require_service() { # name
  is_service "$1" || die "there is no service $1" "services: ${service_names[*]}"
}

require_column() { # column
  case $1 in
    service | machine | database | broker | calls) ;;
    *) die "the table of services has no column $1" ;;
  esac
}

# Reads the table into the two variables above, or dies naming file, line and rule.
read_services() { # file
  local LC_ALL=C file=$1 line number=0 name other fields progress
  local -A line_of=() unresolved=()
  [[ -r $file ]] || die "cannot read $file"
  refuse() { die "$file, line $1: $2" "${@:3}"; }

  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    read -r -a fields <<<"$line"
    [[ ${#fields[@]} -gt 0 && ${fields[0]} != '#'* ]] || continue
    ((${#fields[@]} == 5)) || refuse "$number" "${#fields[@]} columns instead of 5" \
      "the columns are: service machine database broker calls"
    name=${fields[0]}
    [[ $name =~ ^[a-z]+$ ]] || refuse "$number" "\"$name\" is not the name of a service: only the letters a to z"
    [[ -z ${line_of[$name]-} ]] || refuse "$number" "$name is in line ${line_of[$name]} already"
    [[ ${fields[1]} =~ ^[a-z][a-z0-9-]*$ ]] \
      || refuse "$number" "\"${fields[1]}\" is not the name of a machine: letters a to z, digits and -"
    [[ ${fields[2]} =~ ^(-|[a-z][a-z0-9_]*)$ ]] \
      || refuse "$number" "\"${fields[2]}\" is not the name of a database: letters a to z, digits and _, or - for none"
    for other in "${service_names[@]}"; do
      [[ ${fields[2]} == - || ${fields[2]} != "${service_fields[$other database]}" ]] \
        || refuse "$number" "the database ${fields[2]} belongs to $other: each service has its own"
    done
    [[ ${fields[3]} =~ ^(-|publish|consume)$ ]] || refuse "$number" "broker is publish, consume or -, not \"${fields[3]}\""
    [[ ${fields[4]} =~ ^(-|[a-z]+(,[a-z]+)*)$ ]] \
      || refuse "$number" "\"${fields[4]}\" is no list of services: names with a comma between them and no blank, or - for none"
    line_of[$name]=$number
    service_names+=("$name")
    service_fields[$name service]=$name
    service_fields[$name machine]=${fields[1]}
    service_fields[$name database]=${fields[2]}
    service_fields[$name broker]=${fields[3]}
    service_fields[$name calls]=${fields[4]}
  done <"$file"
  ((${#service_names[@]})) || die "$file: there is no service in it"

  for name in "${service_names[@]}"; do
    for other in $(callees_of "$name"); do
      [[ -n ${line_of[$other]-} ]] || refuse "${line_of[$name]}" "$name calls $other, which is not in the table"
    done
    unresolved[$name]=yes
  done
  # What calls only services that call none, and so on: what is never reached has a circle.
  progress=yes
  while [[ -n $progress ]]; do
    progress=''
    for name in "${!unresolved[@]}"; do
      for other in $(callees_of "$name"); do
        [[ -z ${unresolved[$other]-} ]] || continue 2
      done
      unset "unresolved[$name]"
      progress=yes
    done
  done
  for name in "${service_names[@]}"; do
    [[ -z ${unresolved[$name]-} ]] || refuse "${line_of[$name]}" "$name is in a circle of calls, or calls one that is"
  done
  unset -f refuse
}

read_services "${MATINEE_SERVICES_FILE:-$root/provision/services}"
