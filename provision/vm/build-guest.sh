#!/usr/bin/env bash
# Runs provision/build inside a VM, where the host has made no dist/: compiler, swap for it, and away with both.
# Usage: provision/vm/build-guest.sh   (called by machine.sh)

set -euo pipefail
here=$(dirname "$(readlink --canonicalize "${BASH_SOURCE[0]}")")
. "$here/../lib/guest.sh"
[[ ! -e $dist/SHA256SUMS ]] || exit 0

# Pinned as the toolchain is; the sum is of this version's program for x86-64 Linux.
rustup_version=1.28.2
rustup_sum=20a06e644b0d9bd2fbdbfd52d42540bdde820ea7df86e92e533c073da0cdd43c
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
# The linker alone wants more than a small VM has.
dd if=/dev/zero of="$work/swap" bs=1M count=2048 status=none
chmod 0600 "$work/swap"
mkswap --quiet "$work/swap" 2>/dev/null || mkswap "$work/swap" >/dev/null
swapon "$work/swap" || echo "  no swap here: going on without"

packages ca-certificates curl nodejs "${tools[@]}"
export CARGO_HOME=$work/cargo RUSTUP_HOME=$work/rustup MATINEE_BUILD_DIR=$work/target
curl --silent --show-error --fail --location --max-time 600 --output "$work/rustup-init" \
  "https://static.rust-lang.org/rustup/archive/$rustup_version/x86_64-unknown-linux-gnu/rustup-init"
sha256sum --quiet --check <<<"$rustup_sum  $work/rustup-init"
chmod 0755 "$work/rustup-init"
RUSTUP_TOOLCHAIN=$(sed --quiet 's/^channel = "\(.*\)"$/\1/p' "$root/rust-toolchain.toml")
export RUSTUP_TOOLCHAIN CARGO_BUILD_JOBS=1
"$work/rustup-init" -y --quiet --no-modify-path --profile minimal --default-toolchain "$RUSTUP_TOOLCHAIN" >/dev/null
PATH=$CARGO_HOME/bin:$PATH "$here/../build" "$dist"
changed "$dist"
