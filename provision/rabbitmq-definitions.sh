#!/usr/bin/env bash
# Prints RabbitMQ's definitions: virtual host, users, their rights by provision/services, dead-letter policy.
# Usage: provision/rabbitmq-definitions.sh | rabbitmqctl import_definitions

set -euo pipefail
lib=$(dirname "${BASH_SOURCE[0]}")/lib
. "$lib/env.sh"
. "$lib/services.sh"
. "$lib/broker.sh"
load_settings
required=(RABBITMQ_VHOST RABBITMQ_QUEUE RABBITMQ_ADMIN_USER RABBITMQ_ADMIN_PASSWORD)
for service in $(services_with broker); do
  required+=("$(setting_name "$service" RABBITMQ_USER)" "$(setting_name "$service" RABBITMQ_PASSWORD)")
done
require "${required[@]}"

json() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

user() { # name, password, tags
  printf '{"name": %s, "password": %s, "tags": %s}' "$(json "$1")" "$(json "$2")" "$(json "$3")"
}

# Each right is a pattern of names; an empty one allows nothing. "amq.default" is the default
# exchange, which delivers a message to the queue of the name that the message carries.
permission() { # user, configure, write, read
  printf '{"user": %s, "vhost": %s, "configure": %s, "write": %s, "read": %s}' \
    "$(json "$1")" "$(json "$RABBITMQ_VHOST")" "$(json "$2")" "$(json "$3")" "$(json "$4")"
}

# Durable and without arguments, so that any other client's plain declaration is the same.
topic_exchange() { # name
  printf '{"name": %s, "vhost": %s, "type": "topic", "durable": true, "auto_delete": false, "internal": false, "arguments": {}}' \
    "$(json "$1")" "$(json "$RABBITMQ_VHOST")"
}

# The rights and the policy have patterns: in them the names are quoted.
# shellcheck disable=SC2001,SC2016 # a class of characters
pattern_of() { sed 's/[][\\.|$(){}?+*^]/\\&/g' <<<"$1"; }

queue=$(pattern_of "$RABBITMQ_QUEUE")
exchanges=''
users=$(user "$RABBITMQ_ADMIN_USER" "$RABBITMQ_ADMIN_PASSWORD" "administrator,$broker_tag")
permissions=$(permission "$RABBITMQ_ADMIN_USER" '.*' '.*' '.*')
for service in $(services_with broker); do
  name=$(setting "$service" RABBITMQ_USER)
  users+=$',\n    '$(user "$name" "$(setting "$service" RABBITMQ_PASSWORD)" "$broker_tag")
  case $(service_field "$service" broker) in
    publish)
      exchange=$(setting "$service" RABBITMQ_EXCHANGE)
      if [[ -n $exchange ]]; then
        exchanges+=${exchanges:+$',\n    '}$(topic_exchange "$exchange")
        exchange=$(pattern_of "$exchange")
        rights=$(permission "$name" "^($queue|$exchange)\$" "^(amq\\.default|$exchange)\$" '')
      else
        rights=$(permission "$name" "^$queue\$" '^amq\.default$' '')
      fi
      ;;
    consume) rights=$(permission "$name" "^$queue(\\.dead)?\$" '^amq\.default$' "^$queue(\\.dead)?\$") ;;
  esac
  permissions+=$',\n    '$rights
done

# Dead letters by a policy and not by arguments of the queue: so a client that declares the queue
# as durable and without arguments gets no error. "lazy" keeps waiting messages on the disk only;
# in the memory of the queue's process they would lengthen its garbage collections, during which
# every publisher and consumer of the queue waits. From RabbitMQ 3.12 on every queue is lazy,
# and the setting has no effect.
cat <<JSON
{
  "vhosts": [{"name": $(json "$RABBITMQ_VHOST")}],
  "users": [
    $users
  ],
  "permissions": [
    $permissions
  ],
  "exchanges": [
    $exchanges
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
