#!/usr/bin/env bash
# PostgreSQL on loopback, with the roles, databases and migrations of the services on this machine.
# Usage: provision/vm/postgresql.sh SERVICE…   (called by machine.sh)

set -euo pipefail
here=$(dirname "$(readlink --canonicalize "${BASH_SOURCE[0]}")")
. "$here/../lib/guest.sh"
port=$(setting "$1" DB_PORT)
for service in "$@"; do
  [[ "$(setting "$service" DB_PORT)" == "$port" ]] \
    || die "$(setting_name "$service" DB_PORT) and $(setting_name "$1" DB_PORT) differ: a machine has one PostgreSQL"
done

packages postgresql
settings=$(compgen -G '/etc/postgresql/*/main/conf.d')
before=$changes
# Small, because the machine is; durable, because a 2xx promises it.
put "$settings/matinee.conf" 0644 <<CONF
listen_addresses = '127.0.0.1'
port = $port
max_connections = 100
shared_buffers = '64MB'
max_wal_size = '512MB'
jit = off
fsync = on
synchronous_commit = on
password_encryption = 'scram-sha-256'
CONF
((changes == before)) || systemctl --quiet try-restart postgresql
enable_unit postgresql
await 120 "PostgreSQL" pg_isready --quiet --host /var/run/postgresql --port "$port"

# The system user postgres needs no password on PostgreSQL's socket.
for service in "$@"; do
  runuser --user postgres -- env PGHOST=/var/run/postgresql PGPORT="$port" PGUSER=postgres \
    DBMATE="$home/npm/node_modules/.bin/dbmate" "$here/../migrate.sh" "$service" | while IFS= read -r line; do
    if [[ $line == Applied:* ]]; then changed "$line"; fi
  done
done
