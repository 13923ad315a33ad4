#!/usr/bin/env bash
# PostgreSQL on loopback, with one service's roles, database and migrations.
# Usage: provision/vm/postgresql.sh INVENTORY|BILLING   (called by machine.sh)

set -euo pipefail
here=$(dirname "$(readlink --canonicalize "${BASH_SOURCE[0]}")")
. "$here/../lib/guest.sh"
port=$1_DB_PORT
port=${!port}

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

# As the system's user postgres, whom PostgreSQL's socket knows without a password.
runuser --user postgres -- env PGHOST=/var/run/postgresql PGPORT="$port" PGUSER=postgres \
  DBMATE="$home/npm/node_modules/.bin/dbmate" "$here/../migrate.sh" "${1,,}" | while IFS= read -r line; do
  if [[ $line == Applied:* ]]; then changed "$line"; fi
done
