#!/usr/bin/env bash
# Installs the program of one service and its settings, which only root may read; starts and saves it under PM2.
# Usage: provision/vm/service.sh SERVICE   (called by machine.sh)

set -euo pipefail
here=$(dirname "$(readlink --canonicalize "${BASH_SOURCE[0]}")")
. "$here/../lib/guest.sh"
service=$1
export PM2_HOME=/root/.pm2 MATINEE_BIN_DIR=$home/bin MATINEE_USER=matinee

# The settings of the service, by the rule of the ecosystem file.
environment() {
  local list
  list=$(mktemp)
  compgen -e | sed 's/$/=/' >"$list"
  # The file has only names; the ecosystem file takes the values from the environment.
  MATINEE_ENV_FILE=$list node --print "
    const { env } = require('$here/../ecosystem.config.js').apps.find(app => app.name === '${service}_app')
    Object.entries(env).map(([name, value]) => name + '=' + value).sort().join('\n')"
  rm --force "$list"
}

answers() {
  curl --silent --fail --output /dev/null --max-time 10 --noproxy '*' "$(service_url "$service")/$1"
}

(cd "$dist" && sha256sum --quiet --check --ignore-missing SHA256SUMS)
put_file "$dist/$service" "$home/bin/$service" 0755
put_file "$here/../ecosystem.config.js" "$home/provision/ecosystem.config.js" 0644
put_file "$here/../services" "$home/provision/services" 0644
install --directory --mode 0700 /etc/matinee
settings=$(environment)
put "/etc/matinee/$service.env" 0600 <<<"$settings"

if ((changes > 0)) || ! answers health; then
  MATINEE_ENV_FILE=/etc/matinee/$service.env \
    pm2 startOrReload "$home/provision/ecosystem.config.js" --only "${service}_app" --update-env --silent
  pm2 save --silent
  changed "${service}_app started"
fi
await 120 "${service}_app" answers health
answers health/ready || echo "  ${service}_app waits for what it depends on"
