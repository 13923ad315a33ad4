#!/usr/bin/env bash
# Prints what RabbitMQ shall hold as its definitions: virtual host, users, rights, dead-letter policy.
# Usage: provision/rabbitmq-definitions.sh | rabbitmqctl import_definitions

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"
load_settings
require RABBITMQ_VHOST RABBITMQ_QUEUE RABBITMQ_ADMIN_USER RABBITMQ_ADMIN_PASSWORD \
  GATEWAY_RABBITMQ_USER GATEWAY_RABBITMQ_PASSWORD BILLING_RABBITMQ_USER BILLING_RABBITMQ_PASSWORD

json() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

user() { # name, password, tag
  printf '{"name": %s, "password": %s, "tags": %s}' "$(json "$1")" "$(json "$2")" "$(json "$3")"
}

# Each right is a pattern of names; an empty one allows nothing.
# "amq.default" is the default exchange, by which a message reaches a queue by name.
permission() { # user, configure, write, read
  printf '{"user": %s, "vhost": %s, "configure": %s, "write": %s, "read": %s}' \
    "$(json "$1")" "$(json "$RABBITMQ_VHOST")" "$(json "$2")" "$(json "$3")" "$(json "$4")"
}

queue=${RABBITMQ_QUEUE//./\\.}

# Dead letters by a policy, not by arguments of the queue: a client that
# declares the queue as plain and durable still finds what it expects. Lazy, so that
# waiting messages lie on the disk and not in the queue's heap as well: its garbage collection
# keeps everybody waiting. From RabbitMQ 3.12 on every queue is like that, and the word means
# nothing.
cat <<JSON
{
  "vhosts": [{"name": $(json "$RABBITMQ_VHOST")}],
  "users": [
    $(user "$RABBITMQ_ADMIN_USER" "$RABBITMQ_ADMIN_PASSWORD" administrator),
    $(user "$GATEWAY_RABBITMQ_USER" "$GATEWAY_RABBITMQ_PASSWORD" ''),
    $(user "$BILLING_RABBITMQ_USER" "$BILLING_RABBITMQ_PASSWORD" '')
  ],
  "permissions": [
    $(permission "$RABBITMQ_ADMIN_USER" '.*' '.*' '.*'),
    $(permission "$GATEWAY_RABBITMQ_USER" "^$queue\$" '^amq\.default$' ''),
    $(permission "$BILLING_RABBITMQ_USER" "^$queue(\\.dead)?\$" '^amq\.default$' "^$queue(\\.dead)?\$")
  ],
  "policies": [
    {
      "vhost": $(json "$RABBITMQ_VHOST"),
      "name": "dead-letters",
      "pattern": $(json "^$queue\$"),
      "apply-to": "queues",
      "priority": 0,
      "definition": {
        "queue-mode": "lazy",
        "dead-letter-exchange": "",
        "dead-letter-routing-key": $(json "$RABBITMQ_QUEUE.dead")
      }
    }
  ]
}
JSON
