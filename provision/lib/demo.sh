#!/usr/bin/env bash
# Accounts, products and carts to try the store with, on this machine only.
# Sourced by provision/local after accounts.sh.
# shellcheck disable=SC2154 # the variables are those of .env

# sku|name|price|on hand|description
demo_products='classic-box|The Classic Box|9.99|100|Six silent films
family-box|The Family Box|14.99|80|Six films for all ages
veggie-box|The Veggie Box|12.99|60|Six films without a steak
noir-box|The Noir Box|11.99|40|Six films at night
western-box|The Western Box|10.99|40|Six films with horses
short-box|The Short Box|4.99|200|Twelve short films
poster-metropolis|Poster: Metropolis|19.99|25|70 by 100 cm
poster-m|Poster: M|17.99|25|70 by 100 cm
projector-lamp|Projector Lamp|89.99|5|For all projectors of the store
popcorn-salted|Popcorn, Salted|2.99|500|100 g
popcorn-sweet|Popcorn, Sweet|2.99|500|100 g
gift-card|Gift Card|24.99|1000|For one year'

# Two administrators, two customers with a cart each, and a dozen products; what is there stays.
demo() {
  local email service host token sku name price on_hand description
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
  demo_request POST /api/v1/auth/login "{\"email\":\"${DEMO_ADMINS%%,*}\",\"password\":\"$DEMO_PASSWORD\"}"
  token=$(sed --regexp-extended 's/.*"access_token":"([^"]+)".*/\1/' <<<"$demo_body")
  [[ $demo_status == 200 ]] || die "the login of ${DEMO_ADMINS%%,*} is answered $demo_status" "$demo_body" \
    "is the stack up? provision/local status"
  while IFS='|' read -r sku name price on_hand description; do
    demo_request POST /api/v1/products \
      "{\"sku\":\"$sku\",\"name\":\"$name\",\"price\":\"$price\",\"description\":\"$description\"}" "$token"
    case $demo_status in
      201)
        demo_request PUT "/api/v1/products/$sku/stock" "{\"on_hand\":$on_hand,\"reason\":\"demo\"}" "$token"
        [[ $demo_status == 200 ]] || die "the stock of $sku: $demo_status $demo_body"
        echo "created: $sku, $price, $on_hand on hand"
        ;;
      409) echo "there already: $sku" ;;
      *) die "the product $sku: $demo_status $demo_body" ;;
    esac
  done <<<"$demo_products"
  for email in ${DEMO_CUSTOMERS//,/ }; do
    demo_request POST /api/v1/auth/login "{\"email\":\"$email\",\"password\":\"$DEMO_PASSWORD\"}"
    token=$(sed --regexp-extended 's/.*"access_token":"([^"]+)".*/\1/' <<<"$demo_body")
    for sku in family-box popcorn-sweet; do
      demo_request PUT "/api/v1/carts/me/items/$sku" '{"quantity":2}' "$token"
      [[ $demo_status == 200 ]] || die "the cart of $email: $demo_status $demo_body"
    done
    echo "in the cart of $email: two family-box and two popcorn-sweet"
  done
  show_login "${DEMO_ADMINS%%,*}" "$DEMO_PASSWORD"
}

# Sets demo_status and demo_body. The token is not on the command line, where others could read it.
demo_request() { # method, path, body, token
  local answer
  answer=$(curl --silent --show-error --max-time 20 --noproxy '*' --request "$1" --data "$3" --write-out '\n%{http_code}' \
    --header 'Content-Type: application/json' --config - "$(service_url gateway)$2" \
    <<<"${4:+header = \"Authorization: Bearer $4\"}") || true
  demo_status=${answer##*$'\n'}
  demo_body=${answer%$'\n'*}
}
