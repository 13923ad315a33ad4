#!/usr/bin/env bash
# Makes a VM what its role says, step by step; safe to run again, and then it changes nothing.
# Usage: provision/vm/machine.sh gateway|inventory|billing   (as root in the VM; settings by the environment)

set -euo pipefail
here=$(dirname "$(readlink --canonicalize "${BASH_SOURCE[0]}")")
. "$here/../lib/guest.sh"

role=${1-}
case $role in
  gateway) require GATEWAY_PORT ;;
  inventory) require INVENTORY_DB_PORT GATEWAY_ADDRESS ;;
  billing) require BILLING_DB_PORT RABBITMQ_HOST GATEWAY_ADDRESS ;;
  *) die "usage: provision/vm/machine.sh gateway|inventory|billing" ;;
esac
((EUID == 0)) || die "this makes a machine: run it as root in the VM"

CHANGES=$(mktemp)
export CHANGES
current=''
end() {
  local code=$?
  rm --force "$CHANGES"
  [[ -z $current ]] || printf '%s: step failed: %s\n' "$role" "$current" >&2
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
step "packages, user, firewall, PM2" "$here/base.sh" "$role"
case $role in
  inventory) step "PostgreSQL, movies_db" "$here/postgresql.sh" INVENTORY ;;
  billing)
    step "RabbitMQ" "$here/rabbitmq.sh"
    step "PostgreSQL, billing_db" "$here/postgresql.sh" BILLING
    ;;
esac
step "${role}_app" "$here/service.sh" "$role"

printf '%s: done, %d changed\n' "$role" "$(wc --lines <"$CHANGES")"
