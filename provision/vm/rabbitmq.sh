#!/usr/bin/env bash
# RabbitMQ on the private address, its management and everything else of it on loopback.
# Usage: provision/vm/rabbitmq.sh   (called by machine.sh)

set -euo pipefail
here=$(dirname "$(readlink --canonicalize "${BASH_SOURCE[0]}")")
. "$here/../lib/guest.sh"
. "$here/../lib/broker.sh"

packages rabbitmq-server

before=$changes
# The node's name has no part of the machine's: its data would not be found after a change of that.
put /etc/rabbitmq/rabbitmq-env.conf 0644 <<'CONF'
NODENAME=rabbit@localhost
SERVER_ADDITIONAL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1}"
CTL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1}"
CONF
put /etc/rabbitmq/rabbitmq.conf 0644 <<CONF
listeners.tcp.private = $RABBITMQ_HOST:$RABBITMQ_PORT
management.tcp.ip = 127.0.0.1
management.tcp.port = $RABBITMQ_MANAGEMENT_PORT
# Users and rights come from here at each start; where it is set, there is no guest from the beginning.
load_definitions = /etc/rabbitmq/definitions.json
# Two thousand messages are in billing's memory at a time.
max_message_size = 65536
CONF
put /etc/rabbitmq/enabled_plugins 0644 <<<'[rabbitmq_management].'
# The names of nodes are for this machine only.
put /etc/systemd/system/epmd.socket.d/loopback.conf 0644 <<'CONF'
[Socket]
ListenStream=
ListenStream=127.0.0.1:4369
CONF
if ((changes > before)); then
  systemctl daemon-reload
  systemctl stop rabbitmq-server epmd.service epmd.socket
fi

before=$changes
definitions=$("$here/../rabbitmq-definitions.sh")
put /etc/rabbitmq/definitions.json 0640 root:rabbitmq <<<"$definitions"
if ((changes > before)); then systemctl stop rabbitmq-server; fi
enable_unit epmd.socket rabbitmq-server
await 600 "RabbitMQ" broker_ready

if broker_api users/guest --output /dev/null; then
  broker_api users/guest --request DELETE
  changed "guest is gone"
fi
deleted=$(delete_renamed_broker_users)
if [[ -n $deleted ]]; then changed "deleted at the broker, because no setting names it now: ${deleted//$'\n'/, }"; fi
