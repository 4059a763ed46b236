#!/bin/sh
# Installs lmserve if need be, and serves: scripts/serve.sh [MODEL…] [options]; --help lists them. Needs Python only.
set -eu
scripts=$(cd "$(dirname "$0")" && pwd)
"$scripts/setup.sh"
exec "$scripts/../.venv/bin/lmserve" serve "$@"
