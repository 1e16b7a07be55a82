#!/usr/bin/env bash
# Installs what building and testing Sluice needs on Debian 12, if it is missing; otherwise says exactly what to install.
# Usage: scripts/setup.sh [--check]   (--check: install nothing, only tell)
set -euo pipefail

packages=(
  g++ cmake ninja-build make git ca-certificates    # build
  libtomlplusplus-dev libcli11-dev nlohmann-json3-dev  # configuration, command line, JSON
  libboost1.81-dev libssl-dev                       # transport tcp, rendezvous
  libhwloc-dev                                      # what hosts have
  libopenmpi-dev openmpi-bin                        # transport mpi
  libucx-dev                                        # transport ucx
  ucx-utils                                         # baseline of the link benchmark
  libgtest-dev python3 python3-numpy                # tests
  libopenblas-dev libdnnl-dev                       # baselines of the benchmarks
)

missing=()
for p in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "${1:-}" = "--check" ]; then
  echo "missing packages: ${missing[*]}" >&2
  exit 1
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null 2>&1; then
    echo "These packages are missing and need root to install. Run as root:" >&2
    echo "  apt-get update && apt-get install -y --no-install-recommends ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi
echo "installing: ${missing[*]}" >&2
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
