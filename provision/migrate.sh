#!/usr/bin/env bash
# Makes one service's roles and database, then applies the migrations that are missing.
# Usage: provision/migrate.sh INVENTORY|BILLING   (a superuser by PGHOST, PGUSER, …)

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"
load_settings

case ${1-} in
  INVENTORY) group=inventory_service migrations=$root/sql/movies_db ;;
  BILLING) group=billing_service migrations=$root/sql/billing_db ;;
  *) die "usage: provision/migrate.sh INVENTORY|BILLING" ;;
esac

# The variables of this service under names without its prefix.
for part in HOST PORT NAME USER PASSWORD OWNER OWNER_PASSWORD; do
  variable=$1_DB_$part
  require "$variable"
  export "MATINEE_DB_$part=${!variable}"
done

# The values come by \getenv: a command line can be read by every user of a machine.
# If a statement fails, it is not logged, because it may hold a password.
# Roles belong to the whole cluster, databases may be two: hence "if not exists" in both.
roles_and_database() {
  PGOPTIONS='-c client_min_messages=warning -c log_min_error_statement=panic' \
    psql --no-psqlrc --quiet --no-align --tuples-only --set ON_ERROR_STOP=1 \
    --dbname postgres --set "group=$group" --output /dev/null <<'SQL'
\getenv name MATINEE_DB_NAME
\getenv user MATINEE_DB_USER
\getenv password MATINEE_DB_PASSWORD
\getenv owner MATINEE_DB_OWNER
\getenv owner_password MATINEE_DB_OWNER_PASSWORD

select format('create role %I nologin', :'group')
where not exists (select from pg_roles where rolname = :'group') \gexec
select format('create role %I login', :'user')
where not exists (select from pg_roles where rolname = :'user') \gexec
select format('create role %I login', :'owner')
where not exists (select from pg_roles where rolname = :'owner') \gexec

alter role :"user" with login nosuperuser nocreatedb nocreaterole password :'password';
alter role :"owner" with login nosuperuser nocreatedb nocreaterole password :'owner_password';
grant :"group" to :"user";

select format('create database %I owner %I template template0 encoding ''UTF8'' locale ''C.UTF-8''', :'name', :'owner')
where not exists (select from pg_database where datname = :'name') \gexec

revoke all on database :"name" from public;
grant connect on database :"name" to :"group";

\connect :"name"
revoke create on schema public from public;
SQL
}

# For the parts of a URL: every byte that is not plain becomes %XX.
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

# As the owner, who is no superuser: what a migration makes belongs to the owner.
migrate() {
  local url
  printf -v url 'postgres://%s:%s@%s:%s/%s?sslmode=%s' \
    "$(url_encoded "$MATINEE_DB_OWNER")" "$(url_encoded "$MATINEE_DB_OWNER_PASSWORD")" \
    "$MATINEE_DB_HOST" "$MATINEE_DB_PORT" "$(url_encoded "$MATINEE_DB_NAME")" "${PGSSLMODE:-disable}"
  DATABASE_URL=$url "${DBMATE:-$root/.local/npm/node_modules/.bin/dbmate}" \
    --env-file /dev/null --no-dump-schema --migrations-dir "$migrations" migrate
}

roles_and_database
migrate
