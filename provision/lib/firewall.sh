#!/usr/bin/env bash
# The rules of a machine's firewall, from the table of services and the addresses in .env.
# Sourced after services.sh.
# shellcheck disable=SC2154 # the variables are those of .env

# gateway-vm has its address in VM_GATEWAY_IP.
ip_variable() { # machine
  local name=${1%-vm}
  printf 'VM_%s_IP\n' "$(tr '[:lower:]-' '[:upper:]_' <<<"$name")"
}

# Besides ssh: the ports of this machine's services for the machines whose services call them, the broker's
# port for those that use it, and for every address the port of a service that no service calls and that
# listens on every address.
firewall_rules() { # machine
  local service caller suffix port machines
  for service in $(services_on "$1"); do
    for suffix in PORT INTERNAL_PORT; do
      port=$(setting "$service" "$suffix")
      [[ -n $port ]] || continue
      machines=$(for caller in $(callers_of "$service"); do
        [[ $(port_for "$caller" "$service") != "$suffix" ]] || service_field "$caller" machine
      done)
      allow "$1" "$port" "$machines"
      if [[ $suffix == PORT && -z $(callers_of "$service") && "$(setting "$service" HOST)" == 0.0.0.0 ]]; then
        printf 'tcp dport %s accept\n' "$port"
      fi
    done
    if [[ "$(service_field "$service" broker)" == consume ]]; then
      machines=$(for caller in $(services_with broker); do service_field "$caller" machine; done)
      allow "$1" "$RABBITMQ_PORT" "$machines"
    fi
  done
}

# Which port of a service a caller needs. A service that no other one calls forwards the requests of
# clients, so it gets the public API and never the internal one.
port_for() { # caller, service
  if [[ -n $(callers_of "$1") && -n $(setting "$2" INTERNAL_PORT) ]]; then echo INTERNAL_PORT; else echo PORT; fi
}

# A port of this machine for other machines.
allow() { # this machine, port, machines
  local other ip
  while IFS= read -r other; do
    [[ -n $other && $other != "$1" ]] || continue
    ip=$(ip_variable "$other")
    printf 'ip saddr %s tcp dport %s accept\n' "${!ip}" "$2"
  done <<<"$3"
}
