#!/usr/bin/env bash
# An isolated stack for a test: settings, servers and processes shared neither with `up` nor with another test.
# Sourced by provision/local; needs $work, $tools and $target.

# The settings of .env with other ports. At exit everything that runs by them is stopped and deleted.
isolated_settings() {
  local service variable ports next=0
  test_dir=$work/test-$$
  mkdir --parents "$test_dir"
  echo $$ >"$test_dir/owner"
  trap end_test EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  set_pm2_home "$test_dir/pm2"
  servers=$test_dir/servers
  MATINEE_BIN_DIR=$target/debug

  read -r -a ports < <(free_ports $((5 + 3 * $(services | wc -l))))
  assign_port() { # variable, what stands before the port
    export "$1=${2-}${ports[next++]}"
  }
  for variable in POSTGRES_PORT RABBITMQ_PORT RABBITMQ_MANAGEMENT_PORT RABBITMQ_DIST_PORT RABBITMQ_EPMD_PORT; do
    assign_port "$variable"
  done
  for service in $(services); do
    export "$(setting_name "$service" HOST)=127.0.0.1"
    assign_port "$(setting_name "$service" PORT)"
    assign_port "$(setting_name "$service" METRICS_LISTEN)" 127.0.0.1:
    if [[ -n $(setting "$service" INTERNAL_PORT) ]]; then assign_port "$(setting_name "$service" INTERNAL_PORT)"; fi
  done
  for service in $(services_with database); do
    export "$(setting_name "$service" DB_HOST)=127.0.0.1" "$(setting_name "$service" DB_PORT)=$POSTGRES_PORT"
  done
  # All clients of a test have one address.
  export RABBITMQ_HOST=127.0.0.1 GATEWAY_LOGIN_RATE_LIMIT=0
  # By this variable the tests in Rust know that the servers of these settings run.
  export MATINEE_TEST_SERVERS_DIR=$servers
}

# Below 30000: above 32768 the kernel takes ports for outgoing connections.
free_ports() { # how many
  node --eval '
    const net = require("node:net"), count = Number(process.argv[1]), free = []
    const next = () => {
      if (free.length === count) return console.log(free.join(" "))
      const port = 10000 + Math.floor(Math.random() * 20000), server = net.createServer()
      server.once("error", next)
      server.listen({ port, host: "127.0.0.1" }, () => server.close(() => { if (!free.includes(port)) free.push(port); next() }))
    }
    next()' "$1"
}

test_servers() {
  with_lock install_tools
  "$root/provision/dev-servers" start "$servers"
}

# The services under PM2 as users have them, but debug builds, because `cargo test` compiles those anyway.
test_stack() {
  [[ ! -e $test_dir/stack ]] || return 0
  build_services
  test_servers
  pm2 start "$root/provision/ecosystem.config.js" --silent
  await_ready
  touch "$test_dir/stack"
}

# Also after a failure or an interrupt. The logs of a failed run are kept.
end_test() {
  local code=$?
  trap - EXIT
  trap '' INT TERM HUP
  if ((code != 0)); then
    rm --recursive --force "$work/failed-test"
    mkdir "$work/failed-test"
    cp "$PM2_HOME"/logs/*.log "$servers/postgres/log" "$servers/rabbitmq/log/rabbitmq.log" "$work/failed-test/" 2>/dev/null \
      && echo "the logs of the apps and servers are in $work/failed-test"
  fi
  remove_test "$test_dir"
  exit "$code"
}

remove_test() { # directory
  local process programs
  set_pm2_home "$1/pm2"
  if pm2_runs; then pm2 kill >/dev/null; fi
  # Services whose test was killed before it could stop them. Their environment names their test.
  programs=$(services | paste --serial --delimiters '|')
  for process in /proc/[0-9]*; do
    [[ "$(readlink "$process/exe")" =~ /($programs|faults-[0-9a-f]+)$ ]] || continue
    if grep --quiet --text --no-messages --fixed-strings "MATINEE_TEST_SERVERS_DIR=$1/servers" "$process/environ"; then
      kill -KILL "${process#/proc/}" || true
    fi
  done
  "$root/provision/dev-servers" remove "$1/servers"
  rm --recursive --force "$1" "$PM2_HOME"
}

# Removes what a test has left that was killed before it could clean up.
clean_stale_tests() {
  local directory pid home=$PM2_HOME
  for directory in "$work"/test-*; do
    [[ -d $directory ]] || continue
    pid=$(cat "$directory/owner" 2>/dev/null || echo 0)
    if ! grep --quiet --text --no-messages local "/proc/$pid/cmdline"; then remove_test "$directory"; fi
  done
  set_pm2_home "$home"
}
