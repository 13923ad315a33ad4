#!/usr/bin/env bash
# Accounts on the local stack.
# Sourced by provision/local; needs $MATINEE_BIN_DIR.

# An account that is there is promoted and gets the password.
admin() { # e-mail address
  require_customers
  [[ ! -t 0 ]] || echo "the password of $1, 8 to 128 characters:"
  "$MATINEE_BIN_DIR/customers" users create --admin "$1"
  show_login "$1" PASSWORD
}

require_customers() {
  [[ -x $MATINEE_BIN_DIR/customers ]] || die "$MATINEE_BIN_DIR/customers is not built yet" "first: provision/local up"
}

show_login() { # e-mail address, password
  echo "to log in:"
  echo "  curl -X POST $(service_url gateway)/api/v1/auth/login -H 'Content-Type: application/json' -d '{\"email\":\"$1\",\"password\":\"$2\"}'"
}
