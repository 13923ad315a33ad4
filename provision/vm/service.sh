#!/usr/bin/env bash
# One service: its program in place, its settings in a file of root's alone, started and saved under PM2.
# Usage: provision/vm/service.sh gateway|inventory|billing   (called by machine.sh)

set -euo pipefail
here=$(dirname "$(readlink --canonicalize "${BASH_SOURCE[0]}")")
. "$here/../lib/guest.sh"
role=$1
export PM2_HOME=/root/.pm2 MATINEE_BIN_DIR=$home/bin MATINEE_USER=matinee

# The ecosystem file knows what each process needs.
environment() {
  local list
  list=$(mktemp)
  compgen -e | sed 's/$/=/' >"$list"
  # In the file are names only: the values it takes from the environment.
  MATINEE_ENV_FILE=$list node --print "
    const { env } = require('$here/../ecosystem.config.js').apps.find(app => app.name === '${role}_app')
    Object.entries(env).map(([name, value]) => name + '=' + value).sort().join('\n')"
  rm --force "$list"
}

# On the address where it listens, but for one that means all.
answers() {
  local address=${role^^}_HOST port=${role^^}_PORT
  address=${!address/#0.0.0.0/127.0.0.1}
  curl --silent --fail --output /dev/null --max-time 10 --noproxy '*' "http://$address:${!port}/$1"
}

(cd "$dist" && sha256sum --quiet --check --ignore-missing SHA256SUMS)
put_file "$dist/$role" "$home/bin/$role" 0755
put_file "$here/../ecosystem.config.js" "$home/provision/ecosystem.config.js" 0644
install --directory --mode 0700 /etc/matinee
settings=$(environment)
put "/etc/matinee/$role.env" 0600 <<<"$settings"

if ((changes > 0)) || ! answers health; then
  MATINEE_ENV_FILE=/etc/matinee/$role.env \
    pm2 startOrReload "$home/provision/ecosystem.config.js" --only "${role}_app" --update-env --silent
  pm2 save --silent
  changed "${role}_app started"
fi
await 120 "${role}_app" answers health
answers health/ready || echo "  ${role}_app waits for what it depends on"
