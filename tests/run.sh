#!/usr/bin/env bash
# Installs what is missing and runs the tests: bash tests/run.sh [PYTEST ARGUMENT ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
spin_setup test
exec "$PYTHON" -m pytest "$@"
