#!/usr/bin/env bash
# Accounts on the local stack: an administrator, and accounts to try the store with.
# Sourced by provision/local; needs $MATINEE_BIN_DIR.

# An account that is there is promoted and gets the password.
admin() { # e-mail address
  require_customers
  [[ ! -t 0 ]] || echo "the password of $1, 8 to 128 characters:"
  "$MATINEE_BIN_DIR/customers" users create --admin "$1"
  show_login "$1" PASSWORD
}

# Two administrators and two customers; those that are there stay.
demo() {
  local email service host
  for service in $(services); do
    for host in "$(setting "$service" HOST)" "$(setting "$service" DB_HOST)"; do
      case $host in
        '' | 127.* | localhost | ::1 | 0.0.0.0 | ::) ;;
        *) die "$service is at $host: accounts whose passwords are in .env are for this machine only" ;;
      esac
    done
  done
  require DEMO_ADMINS DEMO_CUSTOMERS DEMO_PASSWORD
  require_customers
  for email in ${DEMO_ADMINS//,/ }; do
    "$MATINEE_BIN_DIR/customers" users create --admin "$email" <<<"$DEMO_PASSWORD"
  done
  for email in ${DEMO_CUSTOMERS//,/ }; do
    if [[ -n $("$MATINEE_BIN_DIR/customers" users list "$email") ]]; then
      echo "there already: $email"
    else
      "$MATINEE_BIN_DIR/customers" users create "$email" <<<"$DEMO_PASSWORD"
    fi
  done
  show_login "${DEMO_ADMINS%%,*}" "$DEMO_PASSWORD"
}

require_customers() {
  [[ -x $MATINEE_BIN_DIR/customers ]] || die "$MATINEE_BIN_DIR/customers is not built yet" "first: provision/local up"
}

show_login() { # e-mail address, password
  echo "to log in:"
  echo "  curl -X POST $(service_url gateway)/api/v1/auth/login -H 'Content-Type: application/json' -d '{\"email\":\"$1\",\"password\":\"$2\"}'"
}
