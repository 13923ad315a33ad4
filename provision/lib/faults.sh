#!/usr/bin/env bash
# The fault campaign, tests/faults, on an isolated stack.
# Sourced by provision/local; needs $work, $tools and $target.

# The long campaign runs on release builds, as users have them; the short one on debug builds,
# because the tests compile those anyway.
run_faults() { # the campaign's arguments
  clean_stale_tests
  mkdir --parents "$work"
  with_lock install_packages
  isolated_settings
  cd "$root"
  local profile=()
  if [[ " $* " == *' --long '* ]]; then
    install_command slowhttptest
    install_command nft nftables
    build_services --release
    MATINEE_BIN_DIR=$target/release
    profile=(--profile driver)
  else
    build_services
  fi
  test_servers # installs PM2, too
  export MATINEE_PM2=$tools/node_modules/.bin/pm2
  cargo test --locked "${profile[@]}" --package system-tests --test faults -- "$@"
}
