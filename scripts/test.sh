#!/bin/sh
# Installs what is missing, then runs all checks and all tests: scripts/test.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
scripts/setup.sh dev
scripts/check.sh
# A process for each core (at most eight), and a thread in each: threads of several processes on one core only wait for
# each other. A file's tests stay in one process, with the servers and models that they share.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile "$@"
