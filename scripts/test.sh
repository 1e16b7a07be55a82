#!/usr/bin/env bash
# Set-up, build, and every test that needs no GPU.
#   scripts/test.sh              the release build, all labels
#   scripts/test.sh asan|tsan    the same tests under sanitizers (tsan leaves out MPI)
#   scripts/test.sh all          release, asan and tsan
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh

run() {
  scripts/build.sh "$1"
  # Ranks are threads that wait for each other; on a busy machine two test programs at once are enough.
  ctest --test-dir "build/$1" --output-on-failure -j 2 "${@:2}"
}

case "${1:-release}" in
  release) run release "${@:2}" ;;
  asan | tsan) run "$1" "${@:2}" ;;
  all)
    for preset in asan tsan release; do run "$preset"; done
    ;;
  *)
    echo "usage: scripts/test.sh [release|asan|tsan|all] [ctest arguments]" >&2
    exit 2
    ;;
esac
