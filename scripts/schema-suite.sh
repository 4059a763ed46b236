#!/bin/sh
# Puts the public JSON-Schema-Test-Suite (draft 2020-12) into .venv/share, from the sources of a package that brings it.
set -eu
cd "$(dirname "$0")/.."
suite=.venv/share/json-schema-test-suite
rm -rf "$suite"
mkdir -p "$suite"
.venv/bin/python -m pip download -q --no-deps --no-binary :all: -c constraints.txt -d "$suite" jsonschema
for sources in "$suite"/*.tar.gz; do
  tar -xzf "$sources" -C "$suite" --strip-components=3 "$(basename "$sources" .tar.gz)/json/tests/draft2020-12"
  rm "$sources"
done
