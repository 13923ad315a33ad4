#!/usr/bin/env bash
# Installs what the stack and the tests need: Debian packages, tools from npm and PyPI.
# Sourced by provision/local; needs $work and $tools.

# Without starting anything; also further packages. provision/bench uses it.
install_only() { # Debian packages …
  local package
  mkdir --parents "$work"
  with_lock install_packages
  for package; do install_command "$package"; done
  with_lock install_tools
  build_services --release
}

# The packages whose command or file is missing.
install_packages() {
  local missing=()
  # Not by command -v: that finds the function of env.sh.
  type -P curl >/dev/null || missing+=(curl)
  command -v cc >/dev/null || missing+=(gcc libc6-dev)
  command -v ss >/dev/null || missing+=(iproute2)
  command -v ps >/dev/null || missing+=(procps)
  command -v node >/dev/null || missing+=(nodejs)
  command -v npm >/dev/null || missing+=(npm)
  compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || missing+=(postgresql)
  [[ -x /usr/lib/rabbitmq/bin/rabbitmq-server ]] || missing+=(rabbitmq-server)
  apt_install "${missing[@]}"
  (($(node_major) >= 18)) || die "node $(node --version) is too old for PM2, which needs 18" "https://nodejs.org has newer ones"
}

node_major() { node --print 'parseInt(process.versions.node)'; }

install_command() { # command, and its package where that has another name
  command -v "$1" >/dev/null || with_lock apt_install "${2-$1}"
}

apt_install() {
  (($#)) || return 0
  command -v apt-get >/dev/null || die "missing: $*, and this system has no apt-get to install them"
  echo "installing: $*"
  local as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || die "missing: $*, and no sudo to install them" "as root: apt-get install $*"
    as_root=(sudo)
  fi
  # Only the programs of PostgreSQL, RabbitMQ and nginx are needed. Their packages would also create
  # a cluster and start servers on the usual ports. policy-rc.d (101: "not allowed") prevents the
  # start now, systemctl disable prevents it at the next boot, and createcluster.d prevents
  # the cluster. The two files are removed again; only packages installed here are disabled.
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive bash -euo pipefail -s -- "$@" <<'ROOT'
    undo=()
    trap 'rm --force -- "${undo[@]}"' EXIT
    apt-get update --quiet </dev/null
    if [[ ! -e /usr/sbin/policy-rc.d ]]; then
      undo+=(/usr/sbin/policy-rc.d)
      printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
      chmod 0755 /usr/sbin/policy-rc.d
    fi
    if [[ " $* " == *' postgresql '* ]]; then
      mkdir --parents /etc/postgresql-common/createcluster.d
      undo+=(/etc/postgresql-common/createcluster.d/matinee.conf)
      echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.d/matinee.conf
    fi
    apt-get install --quiet --yes --no-install-recommends "$@" </dev/null
    for package in postgresql rabbitmq-server nginx; do
      if [[ " $* " == *" $package "* ]] && command -v systemctl >/dev/null; then
        systemctl disable --quiet "$package" || true
      fi
    done
ROOT
}

# PM2 and dbmate.
install_tools() { npm_install "$tools" --omit=dev; }

# Exactly the versions of the lock file; again only after that has changed.
npm_install() { # directory, options
  local stamp
  stamp=$(cat "$root"/provision/package{,-lock}.json | sha256sum)
  [[ "$(cat "$1/stamp" 2>/dev/null)" != "$stamp" ]] || return 0
  mkdir --parents "$1"
  cp "$root"/provision/{package.json,package-lock.json,.npmrc} "$1/"
  (cd "$1" && npm ci --no-progress --loglevel=error "${@:2}")
  printf '%s\n' "$stamp" >"$1/stamp"
}

# The checks need Node.js 20, PM2 needs 18, and Debian 12 has 18: there, 20 comes from npm.
install_node_checks() {
  with_lock npm_install "$work/npm-dev"
  if (($(node_major) < 20)); then with_lock install_node; fi
}

install_node() {
  [[ -x $work/node/node_modules/.bin/node ]] \
    || npm install --prefix "$work/node" --no-save --no-package-lock --loglevel=error node@20.20.2
}

install_python_checks() { with_lock pip_install; }

pip_install() {
  local requirements=$root/provision/requirements.txt
  ! cmp --silent "$requirements" "$work/venv/requirements.txt" || return 0
  python3 -c 'import ensurepip, venv' 2>/dev/null || apt_install python3-venv
  python3 -m venv --clear "$work/venv"
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$requirements"
  cp "$requirements" "$work/venv/requirements.txt"
}
