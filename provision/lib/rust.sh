#!/usr/bin/env bash
# The pinned Rust toolchain, where there is none: Debian's rustup, else the pinned rustup-init.
# Sourced after env.sh; needs $root.
# shellcheck disable=SC2154

# The sum is of this version's program for x86-64 Linux.
rustup_version=1.28.2
rustup_sum=20a06e644b0d9bd2fbdbfd52d42540bdde820ea7df86e92e533c073da0cdd43c

rust_toolchain() { sed --quiet 's/^channel = "\(.*\)"$/\1/p' "$root/rust-toolchain.toml"; }

# Installs rustup and the toolchain below a directory, and puts cargo on PATH.
install_rust() { # directory
  export CARGO_HOME=$1/cargo RUSTUP_HOME=$1/rustup
  PATH=$CARGO_HOME/bin:$PATH
  [[ ! -x $CARGO_HOME/bin/cargo ]] || return 0
  echo "installing Rust $(rust_toolchain) in $1: about 150 MB to download, 600 MB on the disk"
  mkdir --parents "$1"
  curl --silent --show-error --fail --location --max-time 600 --output "$1/rustup-init" \
    "https://static.rust-lang.org/rustup/archive/$rustup_version/x86_64-unknown-linux-gnu/rustup-init"
  sha256sum --quiet --check <<<"$rustup_sum  $1/rustup-init"
  chmod 0755 "$1/rustup-init"
  "$1/rustup-init" -y --quiet --no-modify-path --profile minimal --default-toolchain "$(rust_toolchain)"
  rm "$1/rustup-init"
}
