#!/usr/bin/env bash
# From a bare checkout to a trained model: installs what is missing, builds the program, trains configs/quickstart.toml.
# Arguments go to `sluice train`, for example: scripts/demo.sh --text ~/books --set train.steps=500
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
echo "building (about two minutes on 2 cores the first time) ..." >&2
scripts/build.sh release sluice_program >&2
exec build/release/sluice train --config configs/quickstart.toml "$@"
