#!/bin/sh
# Format, lint, types, import directions, shell scripts, and that the version is the changelog's. Changes nothing.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
ruff format --check .
ruff check .
mypy
lint-imports
shellcheck scripts/*.sh .ci/run
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' lmserve/__init__.py)
newest=$(sed -n 's/^## \[\([0-9][^]]*\)\].*/\1/p' CHANGELOG.md | head -n 1)
[ "$version" = "$newest" ] || { echo "lmserve is $version, the changelog's newest version is $newest" >&2; exit 1; }
