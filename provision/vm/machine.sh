#!/usr/bin/env bash
# Makes a VM with the services that provision/services puts on it; safe to run again, and then it changes nothing.
# Usage: provision/vm/machine.sh MACHINE   (as root in the VM; settings by the environment)

set -euo pipefail
here=$(dirname "$(readlink --canonicalize "${BASH_SOURCE[0]}")")
. "$here/../lib/guest.sh"
. "$here/../lib/firewall.sh"

machine=${1-}
[[ -n $machine && -n "$(services_on "$machine")" ]] || die "usage: provision/vm/machine.sh MACHINE" "machines: $(machines | paste --serial --delimiters ' ')"
for service in $(services_on "$machine"); do
  require "$(setting_name "$service" PORT)"
  for caller in $(callers_of "$service"); do require "$(ip_variable "$(service_field "$caller" machine)")"; done
done
((EUID == 0)) || die "this makes a machine: run it as root in the VM"

CHANGES=$(mktemp)
export CHANGES
current=''
end() {
  local code=$?
  rm --force "$CHANGES"
  [[ -z $current ]] || printf '%s: step failed: %s\n' "$machine" "$current" >&2
  exit "$code"
}
trap end EXIT

step() { # title, command …
  local started=$SECONDS
  current=$1
  printf '%s …\n' "$1"
  "${@:2}"
  printf '%s: %d s\n' "$1" $((SECONDS - started))
  current=''
}

[[ -e /vagrant/dist/SHA256SUMS ]] || step "programs, built here" "$here/build-guest.sh"
step "packages, user, firewall, PM2" "$here/base.sh" "$machine"
databases=()
for service in $(services_on "$machine"); do
  [[ -z "$(service_field "$service" database)" ]] || databases+=("$service")
  if [[ "$(service_field "$service" broker)" == consume ]]; then step "RabbitMQ" "$here/rabbitmq.sh"; fi
done
if ((${#databases[@]})); then step "PostgreSQL and the databases of ${databases[*]}" "$here/postgresql.sh" "${databases[@]}"; fi
for service in $(services_on "$machine"); do step "${service}_app" "$here/service.sh" "$service"; done

printf '%s: done, %d changed\n' "$machine" "$(wc --lines <"$CHANGES")"
