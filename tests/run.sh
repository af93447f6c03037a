#!/usr/bin/env bash
# Installs what is missing and runs the tests: bash tests/run.sh [PYTEST ARGUMENT ...]
# Without arguments the quick ones first, a process a core, then those that start runs, which need the cores themselves.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
spin_setup test
if (($# == 0)); then
    OMP_NUM_THREADS=1 "$PYTHON" -m pytest -m "not slow and not long" --numprocesses auto --maxprocesses 4 --dist loadfile
    set -- -m "slow and not long"
fi
exec "$PYTHON" -m pytest "$@"
