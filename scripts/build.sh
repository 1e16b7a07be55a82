#!/usr/bin/env bash
# Configures and builds a preset: scripts/build.sh [preset] [target...]. Default: release, everything.
set -euo pipefail
cd "$(dirname "$0")/.."
preset="${1:-release}"
shift || true
launcher=()
command -v ccache >/dev/null 2>&1 && launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
cmake --preset "$preset" "${launcher[@]}" >/dev/null
targets=()
[ $# -gt 0 ] && targets=(--target "$@")
cmake --build --preset "$preset" "${targets[@]}"
