#!/usr/bin/env bash
# Runs provision/build inside a VM when the host has not made dist/. The compiler and its swap are removed afterwards.
# Usage: provision/vm/build-guest.sh   (called by machine.sh)

set -euo pipefail
here=$(dirname "$(readlink --canonicalize "${BASH_SOURCE[0]}")")
. "$here/../lib/guest.sh"
. "$here/../lib/rust.sh"
[[ ! -e $dist/SHA256SUMS ]] || exit 0

work=/var/tmp/matinee-build
tools=()
for name in gcc libc6-dev npm; do
  installed "$name" || tools+=("$name")
done

cleaned() {
  local code=$?
  swapoff "$work/swap" 2>/dev/null || true
  rm --recursive --force "$work"
  ((${#tools[@]} == 0)) || apt_get autoremove --purge "${tools[@]}" >/dev/null || true
  exit "$code"
}
trap cleaned EXIT

rm --recursive --force "$work"
mkdir --parents "$work"
# The linker alone needs more memory than a small VM has.
dd if=/dev/zero of="$work/swap" bs=1M count=2048 status=none
chmod 0600 "$work/swap"
mkswap --quiet "$work/swap" 2>/dev/null || mkswap "$work/swap" >/dev/null
swapon "$work/swap" || echo "  no swap here: going on without"

packages ca-certificates curl nodejs "${tools[@]}"
install_rust "$work/rust" >/dev/null
RUSTUP_TOOLCHAIN=$(rust_toolchain)
export RUSTUP_TOOLCHAIN MATINEE_BUILD_DIR=$work/target CARGO_BUILD_JOBS=1
"$here/../build" "$dist"
changed "$dist"
