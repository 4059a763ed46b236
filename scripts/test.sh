#!/bin/sh
# Installs what is missing, then runs all checks and all tests: scripts/test.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
scripts/setup.sh dev
scripts/check.sh
exec .venv/bin/python -m pytest "$@"
