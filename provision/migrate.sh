#!/usr/bin/env bash
# Makes one service's roles and database, then applies the migrations that are missing.
# Usage: provision/migrate.sh SERVICE   (e.g. inventory; connects as the superuser of PGHOST, PGUSER, …)

set -euo pipefail
lib=$(dirname "${BASH_SOURCE[0]}")/lib
. "$lib/env.sh"
. "$lib/services.sh"
load_settings

(($# == 1)) || die "usage: provision/migrate.sh SERVICE" "services with a database: $(services_with database | paste --serial --delimiters ' ')"
folder=$(service_field "$1" database)
[[ -n $folder ]] || die "$1 has no database"
group=${1}_service
migrations=$root/sql/$folder
[[ -d $migrations ]] || die "$migrations is missing; provision/services names it"

# The variables of this service under names without its prefix.
for part in HOST PORT NAME USER PASSWORD OWNER OWNER_PASSWORD; do
  variable=$(setting_name "$1" "DB_$part")
  require "$variable"
  export "MATINEE_DB_$part=${!variable}"
done

# psql reads the values by \getenv, because every user of a machine can read command lines.
# A statement that fails is not logged, because it may hold a password.
# Roles belong to the whole cluster and may exist where the database does not: each is only made where
# it is missing.
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

-- A login that this service had under another name, in an earlier .env, is disabled.
create temporary view renamed as
select member.rolname as login, service.rolname as service
from pg_auth_members
join pg_roles as member on member.oid = pg_auth_members.member
join pg_roles as service on service.oid = pg_auth_members.roleid
where not member.rolsuper;
select count(*) > 0 as found, string_agg(login, ', ') as logins
from renamed where service = :'group' and login <> :'user' \gset renamed_
\if :renamed_found
\warn NOTE: disabled in PostgreSQL, because the service has another login now: :renamed_logins
select format('alter role %I nologin', login) from renamed
where service = :'group' and login <> :'user' \gexec
select format('revoke %I from %I', service, login) from renamed
where service = :'group' and login <> :'user' \gexec
\endif
drop view renamed;

select format('create database %I owner %I template template0 encoding ''UTF8'' locale ''C.UTF-8''', :'name', :'owner')
where not exists (select from pg_database where datname = :'name') \gexec

revoke all on database :"name" from public;
grant connect on database :"name" to :"group";

\connect :"name"

-- The same for the owner, and what it owns belongs to the new one. A role that owns another database, too,
-- is left as it is.
select count(*) > 0 as found, min(former.rolname) as owner
from pg_database
join pg_roles as former on former.oid = pg_database.datdba
where datname = current_database() and former.rolname <> :'owner' and not former.rolsuper
and not exists (
    select from pg_database as other
    where other.datdba = former.oid and other.datname <> current_database()
) \gset former_
\if :former_found
\warn NOTE: disabled in PostgreSQL, because the database has another owner now: :former_owner
alter role :"former_owner" nologin;
reassign owned by :"former_owner" to :"owner";
\endif

revoke create on schema public from public;
SQL
}

# As the owner, a login without the rights of a superuser: what a migration makes belongs to it.
migrate() {
  local url host=$MATINEE_DB_HOST
  # In a URL an IPv6 address has brackets.
  if [[ $host == *:* && $host != \[* ]]; then host="[$host]"; fi
  printf -v url 'postgres://%s:%s@%s:%s/%s?sslmode=disable' \
    "$(url_encoded "$MATINEE_DB_OWNER")" "$(url_encoded "$MATINEE_DB_OWNER_PASSWORD")" \
    "$host" "$MATINEE_DB_PORT" "$(url_encoded "$MATINEE_DB_NAME")"
  DATABASE_URL=$url "${DBMATE:-$root/.local/npm/node_modules/.bin/dbmate}" \
    --env-file /dev/null --no-dump-schema --migrations-dir "$migrations" migrate
}

roles_and_database
migrate
