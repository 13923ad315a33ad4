#!/usr/bin/env bash
# Backup and restore of every database, one file for each service that has one.
# Sourced by provision/local.

# Under another name first: an interrupted dump is never taken for a complete one.
backup() { # directory
  local service database
  (
    umask 077
    mkdir --parents "$1"
    for service in $(services_with database); do
      database=$(setting "$service" DB_NAME)
      as_superuser pg_dump --format=custom --file "$1/$service.new" "$database"
      mv "$1/$service.new" "$1/$service.dump"
      echo "$1/$service.dump: $database"
    done
  )
}

# Afterwards every database has the content of its dump and no other, and all migrations. The dumps
# are checked and loaded into new databases first; the present ones are replaced only when all are loaded.
restore() { # directory
  local service database
  for service in $(services_with database); do check_dump "$service" "$1/$service.dump"; done
  for service in $(services_with database); do
    database=$(setting "$service" DB_NAME)
    new_database "$service" "$database.restored"
    # The owner and its login may have had other names at the backup.
    as_superuser pg_restore --no-owner --role "$(setting "$service" DB_OWNER)" \
      --exit-on-error --single-transaction --dbname "$database.restored" "$1/$service.dump"
  done
  for service in $(services_with database); do
    database=$(setting "$service" DB_NAME)
    replace_database "$database.restored" "$database"
    as_superuser "$root/provision/migrate.sh" "$service"
    echo "$database now has the content of $1/$service.dump"
  done
}

# Dies unless the file is a complete dump of this service, and the service is stopped.
check_dump() { # service, file
  local database user tables known table
  [[ -r $2 ]] || die "$2 is missing"
  as_superuser pg_restore --file /dev/null "$2" || die "$2 is not a complete dump"
  database=$(setting "$1" DB_NAME)
  user=$(setting "$1" DB_USER)
  [[ -z "$(query "$database" "select 1 from pg_stat_activity where datname = current_database() and usename = '${user//\'/\'\'}'")" ]] \
    || die "$1 is running and uses $database" "stop it first: provision/local pm2 stop all"
  tables=$(as_superuser pg_restore --list "$2" | awk '$4 == "TABLE" && $5 == "public" { print $6 }')
  known=$(query "$database" "select tablename from pg_tables where schemaname = 'public'")
  [[ -n $tables ]] || die "$2 has no tables"
  for table in $tables; do
    grep --quiet --line-regexp --fixed-strings -- "$table" <<<"$known" \
      || die "$2 is not a dump of $1: $database has no table $table" \
        "a dump of a newer version needs that version first: provision/local up"
  done
}

new_database() { # service, name
  query postgres "drop database if exists \"$2\" with (force)" >/dev/null
  query postgres "create database \"$2\" owner \"$(setting "$1" DB_OWNER)\" template template0 encoding 'UTF8' locale 'C.UTF-8'"
}

replace_database() { # new, old
  query postgres "drop database if exists \"$2\" with (force)"
  query postgres "alter database \"$1\" rename to \"$2\""
}

query() { # database, statement
  PGOPTIONS='-c client_min_messages=warning' as_superuser psql --no-psqlrc --quiet --no-align --tuples-only --set ON_ERROR_STOP=1 --dbname "$1" --command "$2"
}

as_superuser() {
  PGHOST=127.0.0.1 PGPORT=$POSTGRES_PORT PGUSER=$POSTGRES_SUPERUSER PGPASSWORD=$POSTGRES_SUPERUSER_PASSWORD "$@"
}
