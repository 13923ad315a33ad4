#!/usr/bin/env bash
# Fuzzing with libFuzzer: builds the targets of tests/fuzz, runs them, and runs the control that must fail.
# Sourced by provision/local; needs $work and $target.

fuzz_targets=(request order message token)

fuzz() { # target, seconds
  local name wanted=("${fuzz_targets[@]}")
  if (($#)); then
    [[ " ${fuzz_targets[*]} " == *" $1 "* ]] || die "there is no target $1" "targets: ${fuzz_targets[*]}"
    wanted=("$1")
  fi
  cd "$root"
  with_lock install_packages
  fuzz_build
  for name in "${wanted[@]}"; do fuzz_run "$name" "${2-600}"; done
}

# The stage of the tests, 10 s a target: the targets compile, every input of the corpus passes, and
# the control fails.
fuzz_all_briefly() {
  local name
  fuzz_build
  for name in "${fuzz_targets[@]}"; do fuzz_run "$name" 10; done
  fuzz_control
}

fuzz_build() {
  install_command g++
  RUSTC_WORKSPACE_WRAPPER=$root/tests/fuzz/rustc \
    cargo build --locked --package fuzz --features fuzz --bins
}

# New inputs stay in .local/fuzz; to keep them: TARGET -merge=1 tests/fuzz/corpus/TARGET .local/fuzz/TARGET
fuzz_run() { # target, seconds
  local found=$work/fuzz/$1 seed=$RANDOM dictionary=order
  [[ ! -e $root/tests/fuzz/$1.dict ]] || dictionary=$1
  mkdir --parents "$found"
  printf '%s: %s s with seed %s\n' "$1" "$2" "$seed"
  if ! fuzzer "$1" -seed="$seed" -max_total_time="$2" -dict="$root/tests/fuzz/$dictionary.dict" \
    -artifact_prefix="$work/fuzz/$1-" "$found" "$root/tests/fuzz/corpus/$1" >"$found.log" 2>&1; then
    grep --text --after-context=4 panicked "$found.log" || tail -n 20 "$found.log"
    die "$1 failed; the log is $found.log" \
      "again: $target/debug/$1 $(grep --text --only-matching "$work/fuzz/$1-[^ ]*" "$found.log" | tail -n 1)"
  fi
  tail -n 1 "$found.log"
}

# The same properties, checked against a reader that accepts a sign in a length: they must fail.
fuzz_control() {
  local directory=$work/fuzz/control
  rm --recursive --force "$directory"
  mkdir --parents "$directory"
  printf 'POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: +13\r\n\r\nabcdefghijklm' >"$directory/signed"
  fuzzer request "$directory/signed" >"$directory/log" 2>&1 || die "the control fails without its mutation; the log is $directory/log"
  ! FUZZ_MUTANT=1 fuzzer request "$directory/signed" >"$directory/log" 2>&1 \
    || die "a reader that accepts a sign in a length was not detected; the log is $directory/log"
  grep --quiet --text panicked "$directory/log" || die "the control ended without a panic; the log is $directory/log"
  echo "a reader that takes Content-Length: +13 for 13 was detected"
}

fuzzer() { RUST_BACKTRACE=0 "$target/debug/$1" -timeout=10 -rss_limit_mb=512 "${@:2}"; }
