#!/usr/bin/env bash
# RabbitMQ's management API, and the logins at the broker that no setting names any more.
# Sourced after services.sh.
# shellcheck disable=SC2154 # the variables are those of .env

# The tag of every user that the definitions make: only those are ours to delete.
broker_tag=matinee

broker_api() { # path, curl's options …
  local user=${RABBITMQ_ADMIN_USER//\\/\\\\} password=${RABBITMQ_ADMIN_PASSWORD//\\/\\\\}
  curl --silent --fail --max-time 20 --noproxy '*' \
    --config <(printf 'user = "%s:%s"\n' "${user//\"/\\\"}" "${password//\"/\\\"}") \
    "http://127.0.0.1:$RABBITMQ_MANAGEMENT_PORT/api/$1" "${@:2}"
}

# The policy is the last of the definitions: when it exists, all are loaded.
broker_ready() { broker_api "policies/$(url_encoded "$RABBITMQ_VHOST")/dead-letters" --output /dev/null; }

# A login that was renamed in .env would stay valid. Prints the name of each that is deleted.
delete_renamed_broker_users() {
  local service name named=("$RABBITMQ_ADMIN_USER")
  for service in $(services_with broker); do named+=("$(setting "$service" RABBITMQ_USER)"); done
  broker_api 'users?columns=name,tags' | node --eval '
    const [tag, ...named] = process.argv.slice(1)
    for (const { name, tags } of JSON.parse(require("node:fs").readFileSync(0, "utf8")))
      if ([tags].flat().join(",").split(",").includes(tag) && !named.includes(name)) console.log(name)
  ' -- "$broker_tag" "${named[@]}" | while IFS= read -r name; do
    broker_api "users/$(url_encoded "$name")" --request DELETE
    printf '%s\n' "$name"
  done
}
