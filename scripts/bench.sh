#!/bin/sh -e
# Measures lmserve beside model.generate and `transformers serve` on one model folder, and prints a table.
#   scripts/bench.sh MODELFOLDER [--quick] [--no-peers] [--streams 1,8,32] [--json FILE]
cd "$(dirname "$0")/.."
[ -x .venv/bin/lmserve ] || { echo "no .venv with lmserve in it: run scripts/test.sh first" >&2; exit 1; }
case " $* " in
*" --no-peers "* | *" --help "* | *" -h "*) ;;
*) # what `transformers serve` needs beyond our own dependencies
  .venv/bin/python -c "import fastapi, openai" 2>/dev/null ||
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
  ;;
esac
exec .venv/bin/python -m benchmarks.serving "$@"
