#!/usr/bin/env bash
# What every machine has: packages, security updates, the services' user, the firewall, PM2.
# Usage: provision/vm/base.sh MACHINE   (called by machine.sh)

set -euo pipefail
here=$(dirname "$(readlink --canonicalize "${BASH_SOURCE[0]}")")
. "$here/../lib/guest.sh"
. "$here/../lib/firewall.sh"

open=$(firewall_rules "$1" | sort --unique | sed '2,$s/^/    /')

packages nodejs nftables unattended-upgrades logrotate curl

# --- security updates ---------------------------------------------------------

put /etc/apt/apt.conf.d/20auto-upgrades 0644 <<'CONF'
APT::Periodic::Update-Package-Lists "1";
APT::Periodic::Unattended-Upgrade "1";
CONF
enable_unit apt-daily.timer apt-daily-upgrade.timer unattended-upgrades.service

# --- network ------------------------------------------------------------------

before=$changes
put /etc/sysctl.d/60-matinee.conf 0644 <<'CONF'
# A service may start before the private address is there.
net.ipv4.ip_nonlocal_bind = 1
# A connection that waits for a process that ends goes to the other one on the same port.
net.ipv4.tcp_migrate_req = 1
CONF
((changes == before)) || sysctl --quiet --load /etc/sysctl.d/60-matinee.conf

before=$changes
put /etc/nftables.conf 0644 <<CONF
#!/usr/sbin/nft -f
flush ruleset

table inet matinee {
  chain input {
    type filter hook input priority filter; policy drop;
    iif lo accept
    ct state established,related accept
    ct state invalid drop
    meta l4proto { icmp, ipv6-icmp } accept
    tcp dport 22 accept
    $open
  }
  chain forward {
    type filter hook forward priority filter; policy drop;
  }
}
CONF
if ((changes > before)); then nft --file /etc/nftables.conf; fi
enable_unit nftables

# --- PM2, and the user under whom it runs the services ---------------------------

if ! getent passwd matinee >/dev/null; then
  useradd --system --user-group --home-dir /nonexistent --shell /usr/sbin/nologin matinee
  changed "user matinee"
fi

if ! cmp --silent "$dist/tools.tar.gz" "$home/tools.tar.gz"; then
  (cd "$dist" && sha256sum --quiet --check --ignore-missing SHA256SUMS)
  rm --recursive --force "$home/npm.new"
  mkdir --parents "$home/npm.new"
  tar --extract --gzip --file "$dist/tools.tar.gz" --directory "$home/npm.new" --no-same-owner
  rm --recursive --force "$home/npm"
  mv "$home/npm.new" "$home/npm"
  if systemctl --quiet is-active pm2-root; then systemctl restart pm2-root; fi
  put_file "$dist/tools.tar.gz" "$home/tools.tar.gz" 0644
fi

# A command before systemd has started PM2 would start a second PM2.
put /usr/local/bin/pm2 0755 <<SH
#!/bin/sh
# PM2 as an operator types it: always the one of the unit pm2-root, which is started if need be.
[ "\$(id -u)" != 0 ] || systemctl --quiet start pm2-root 2>/dev/null || true
exec $home/npm/node_modules/.bin/pm2 "\$@"
SH
put /etc/logrotate.d/matinee 0644 <<'CONF'
/root/.pm2/logs/*.log /root/.pm2/pm2.log {
  su root root
  daily
  maxsize 20M
  rotate 7
  compress
  delaycompress
  missingok
  notifempty
  # PM2 appends, so it goes on at the beginning.
  copytruncate
}
CONF
before=$changes
put /etc/systemd/system/logrotate.timer.d/hourly.conf 0644 <<'CONF'
[Timer]
OnCalendar=
OnCalendar=hourly
CONF
((changes == before)) || systemctl daemon-reload
enable_unit logrotate.timer

export PM2_HOME=/root/.pm2
if [[ ! -e /etc/systemd/system/pm2-root.service ]]; then
  # With nothing saved yet, "resurrect" brings up PM2 alone.
  [[ -e $PM2_HOME/dump.pm2 ]] || { mkdir --parents "$PM2_HOME" && echo '[]' >"$PM2_HOME/dump.pm2"; }
  "$home/npm/node_modules/.bin/pm2" startup systemd -u root --hp /root --silent >/dev/null
  changed "PM2 starts at boot"
fi
enable_unit pm2-root
