#!/bin/sh
# Measures lmserve beside model.generate and `transformers serve` on one model folder, in one run, and prints a table.
#   scripts/bench.sh MODELFOLDER [--no-peers] [options of `lmserve bench`: --quick, --scenario s8, --rounds 1, …]
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/lmserve ] || { echo "no .venv with lmserve in it: run scripts/test.sh first" >&2; exit 1; }
[ $# -gt 0 ] || { sed -n 's/^# \{0,1\}//p' "$0" | sed 1d >&2; exit 2; }
model=$1
shift
peers=yes
if [ "${1:-}" = --no-peers ]; then peers=no; shift; fi
[ -f "$model/config.json" ] || { echo "$model is not a model folder: it has no config.json" >&2; exit 1; }
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
options="--dtype bfloat16"
.venv/bin/lmserve bench --serve "$model" --options "$options" --output "$results/1.json" "$@" >&2
if [ "$peers" = yes ]; then
  # what `transformers serve` needs beyond our own dependencies
  .venv/bin/python -c "import fastapi" 2>/dev/null ||
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
  .venv/bin/lmserve bench --name "transformers serve" --output "$results/2.json" "$@" --model "$model" \
    --command ".venv/bin/transformers serve '$model' --continuous-batching --port {port} --device cpu --dtype bfloat16" >&2
  .venv/bin/python -m benchmarks.one_by_one "$model" --rounds 1 --output "$results/3.json" >&2
fi
.venv/bin/lmserve bench show --markdown "$results"/*.json
