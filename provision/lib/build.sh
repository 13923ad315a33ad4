#!/usr/bin/env bash
# Compiles the programs of the services, and nothing else of the workspace.
# Sourced after services.sh and rust.sh; needs $work.

build_services() { # cargo's options, such as --release
  local name packages=()
  find_rust
  for name in $(services); do packages+=(--package "$name"); done
  (cd "$root" && cargo build --locked "${packages[@]}" --bins "$@")
}

# The user's own cargo; else the toolchain that an earlier run has installed in .local/; else Debian's
# rustup where the system has it, or rustup's own installer.
find_rust() {
  if [[ -x $work/rust/cargo/bin/cargo ]]; then install_rust "$work/rust"; fi
  command -v cargo >/dev/null && return 0
  if command -v apt-cache >/dev/null && apt-cache show rustup >/dev/null 2>&1; then
    apt_install rustup
    export CARGO_HOME=$work/rust/cargo RUSTUP_HOME=$work/rust/rustup
    echo "installing Rust $(rust_toolchain) in $work/rust: about 150 MB to download, 600 MB on the disk"
    rustup toolchain install "$(rust_toolchain)" --profile minimal
  else
    install_rust "$work/rust"
  fi
}

# Where cargo puts what it builds: the user's configuration may name another directory.
target_directory() {
  local found=''
  if command -v cargo >/dev/null; then
    found=$(cd "$root" && cargo metadata --no-deps --offline --format-version 1 2>/dev/null \
      | grep --only-matching '"target_directory":"[^"]*"' | cut --delimiter '"' --fields 4) || true
  fi
  printf '%s\n' "${found:-$root/target}"
}
