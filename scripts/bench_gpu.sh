#!/bin/sh
# Measures a GPU and what part of it lmserve gets: kernels against float64, bandwidth, steps, throughput, starts, each
# as a share of what the device can do. Up to ten minutes, without network or models. Results go to benchmarks/results/.
#   scripts/bench_gpu.sh [--budget SECONDS] [--only SECTIONS] [--models MODELS] [--output FILE]
#   scripts/bench_gpu.sh --device cpu --tiny      tries the benchmark itself on any machine
set -eu
cd "$(dirname "$0")/.."
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
PYTHONPATH=$PWD exec "$python" -m benchmarks.gpu "$@"
