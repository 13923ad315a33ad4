#!/usr/bin/env bash
# The local stack: up, down, reset, status, logs.
# Sourced by provision/local; needs $work, $servers, $tools and $MATINEE_BIN_DIR.

up() {
  hold_lock
  begin 8
  step "settings and ports" check_settings "another port can be chosen in .env"
  step "packages" install_packages "install them by hand and run this again"
  step "tools from npm" install_tools "is the npm registry reachable? npm config get registry"
  step "release binaries" build_release "the compiler's message is in the log"
  step "PostgreSQL and RabbitMQ, databases, migrations" start_servers \
    "provision/local status; another port can be chosen in .env"
  step "the services under PM2" start_apps "provision/local logs; another port can be chosen in .env"
  step "waiting until all are ready" await_ready "provision/local logs"
  step "a first request" first_request "provision/local logs gateway"
  summary
}

down() {
  hold_lock
  if pm2_runs; then pm2 kill; fi
  stop_leftovers
  "$root/provision/dev-servers" stop "$servers"
  echo "all stopped; data stays in $servers"
}

reset() {
  hold_lock
  if pm2_runs; then pm2 kill; fi
  stop_leftovers
  "$root/provision/dev-servers" remove "$servers"
  clean_stale_tests
  ! compgen -G "$work/test-*" >/dev/null || die "a test is running in $(compgen -G "$work/test-*")" "its own end removes it"
  rm --recursive --force "$work" "$PM2_HOME"
  echo "$work is deleted"
}

# Exit code 3 unless everything runs and is ready.
status() {
  local code=0 service
  "$root/provision/dev-servers" status "$servers" || code=3
  if pm2_runs; then pm2 list; else echo "PM2         stopped"; fi
  for service in $(services); do
    if ready "$service"; then
      printf '%-11s %s is ready\n' "$service" "$(service_url "$service")"
    else
      printf '%-11s %s is not ready\n' "$service" "$(service_url "$service")"
      code=3
    fi
  done
  return "$code"
}

logs() { # service or PM2's own arguments
  if (($#)) && is_service "$1"; then set -- "${1}_app" "${@:2}"; fi
  pm2 logs "$@"
}

# --- the steps of up ----------------------------------------------------------

build_release() { build_services --release; }

start_servers() { "$root/provision/dev-servers" start "$servers"; }

# Restarts the services only when a program or a setting has changed, or one is not ready.
start_apps() {
  local service stamp
  require_own_ports
  stamp=$({
    for service in $(services); do cat "$MATINEE_BIN_DIR/$service"; done
    node --print 'JSON.stringify(require(process.argv[1]))' "$root/provision/ecosystem.config.js"
  } | sha256sum)
  if [[ "$(cat "$PM2_HOME/stamp" 2>/dev/null)" == "$stamp" ]] && pm2_runs && all_ready; then return 0; fi
  rm --force "$PM2_HOME/stamp"
  # Deleted and not restarted: PM2 merges environments, so a variable that was removed from .env would
  # stay in force, and it keeps the number of instances.
  if pm2_runs; then pm2 delete all || true; fi
  stop_leftovers
  pm2 start "$root/provision/ecosystem.config.js"
  start_log_rotation
  printf '%s\n' "$stamp" >"$PM2_HOME/stamp"
}

# At once, and then every hour. PM2 takes a script with a blank in its path for a command line, and one without
# an ending for JavaScript. It gives a script the variables of this command, so it has no settings.
start_log_rotation() {
  (
    cd "$root/provision/lib"
    env --ignore-environment PATH="$PATH" HOME="$HOME" PM2_HOME="$PM2_HOME" "$tools/node_modules/.bin/pm2" \
      start rotate-logs --interpreter bash --name log_rotation --no-autorestart --cron-restart '17 * * * *' 3>&- 9>&-
  )
}

# Services of this stack that PM2 does not know, because its daemon was killed: a second set on the
# same ports would answer half of the requests.
stop_leftovers() {
  local service pids pid
  for service in $(services); do
    pids=$(pids_of "$service")
    [[ -n $pids ]] || continue
    echo "NOTE: stopping $service, which PM2 has lost: process ${pids//$'\n'/ }"
    # shellcheck disable=SC2086 # one word for each process
    kill -TERM $pids 2>/dev/null || true
    for pid in $pids; do
      timeout 6 tail --pid="$pid" --follow /dev/null || kill -KILL "$pid" 2>/dev/null || true
    done
  done
}

# The processes that run the program of a service, also one that was replaced on the disk meanwhile.
pids_of() { # service
  local process program
  for process in /proc/[0-9]*; do
    program=$(readlink "$process/exe" 2>/dev/null) || continue
    [[ ${program% (deleted)} != "$MATINEE_BIN_DIR/$1" ]] || printf '%s\n' "${process#/proc/}"
  done
}

# Before anything is built: a port that is taken is found at once.
check_settings() {
  local service database_port
  command -v ss >/dev/null || return 0
  require_own_ports
  for service in $(services_with database); do
    database_port=$(setting "$service" DB_PORT)
    [[ $database_port == "$POSTGRES_PORT" || ! $(setting "$service" DB_HOST) =~ ^(127\..*|localhost|\[?::1\]?)$ ]] \
      || die "$(setting_name "$service" DB_PORT) is $database_port, and POSTGRES_PORT is $POSTGRES_PORT" \
        "both mean the private PostgreSQL of this stack: give them the same value in .env"
  done
}

# The services' listeners may share a port (SO_REUSEPORT, for reloads). So a second stack on the
# same ports would not fail: it would answer half of the requests.
require_own_ports() {
  local service suffix address host user pid
  for service in $(services); do
    for suffix in PORT INTERNAL_PORT METRICS_LISTEN; do
      address=$(setting "$service" "$suffix")
      [[ -n $address ]] || continue
      if [[ $suffix == METRICS_LISTEN ]]; then host=${address%:*}; else host=$(setting "$service" HOST); fi
      user=$(listener "${address##*:}" "$host")
      pid=${user##* }
      pid=${pid%)}
      [[ -z $user || "$(readlink "/proc/$pid/exe" 2>/dev/null)" == "$MATINEE_BIN_DIR"/* ]] \
        || die "port ${address##*:} is taken by $user" "stop that, or choose another $(setting_name "$service" "$suffix") in .env"
    done
  done
}

await_ready() {
  local deadline=$((SECONDS + 60)) service url
  until all_ready; do
    if ((SECONDS > deadline)); then
      for service in $(services); do
        url=$(service_url "$service")/health/ready
        echo "$url: $(curl --silent --max-time 5 --noproxy '*' "$url" || echo 'no answer')"
        tail -n 5 "$PM2_HOME/logs/$service-app-error.log" || true
      done
      die "not ready within 60 s"
    fi
    sleep 0.2
  done
}

all_ready() {
  local service
  for service in $(services); do ready "$service" || return 1; done
}

ready() { # service
  curl --silent --fail --output /dev/null --max-time 5 --noproxy '*' "$(service_url "$1")/health/ready"
}

first_request() {
  curl --silent --show-error --fail --max-time 10 --noproxy '*' "$(service_url gateway)/api/movies?limit=1"
}

summary() {
  local service gateway
  gateway=$(service_url gateway)
  printf '\nMatinee is up.\n'
  for service in $(services); do
    printf '  %-11s %-28s%s\n' "$service" "$(service_url "$service")" "$(duties "$service")"
  done
  # shellcheck disable=SC2153 # the two are different variables
  cat <<TEXT
  PostgreSQL  127.0.0.1:$POSTGRES_PORT
  RabbitMQ    127.0.0.1:$RABBITMQ_PORT             management page: http://127.0.0.1:$RABBITMQ_MANAGEMENT_PORT

The API is at $gateway; $gateway/docs describes it. Try:
  curl -X POST $gateway/api/movies -H 'Content-Type: application/json' -d '{"title":"Metropolis","description":"1927"}'
  curl $gateway/api/movies
  curl -X POST $gateway/api/billing -H 'Content-Type: application/json' -d '{"user_id":"3","number_of_items":"5","total_amount":"180"}'
  (the order is then in: provision/local psql billing_db -c 'select * from orders')
TEXT
}

# What a service uses, in one line: "calls inventory, publishes to billing_queue".
duties() { # service
  local words=() text callees
  mapfile -t callees < <(callees_of "$1")
  if ((${#callees[@]})); then words+=("calls ${callees[*]}"); fi
  case $(service_field "$1" broker) in
    publish) words+=("publishes to $RABBITMQ_QUEUE") ;;
    consume) words+=("consumes $RABBITMQ_QUEUE") ;;
  esac
  if [[ -n $(service_field "$1" database) ]]; then words+=("database $(setting "$1" DB_NAME)"); fi
  printf -v text '%s, ' "${words[@]}"
  printf '%s' "${text%, }"
}
