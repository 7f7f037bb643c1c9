#!/usr/bin/env bash
# Checks style and types. ruff checks the tree; mypy checks a copy in the layout of a wheel, where imports resolve.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for folder in kernels criterions; do
    mkdir -p "$site/fairseq_evomoe"
    cp -r "$folder" "$site/fairseq_evomoe/$folder"
done
cp -r fairseq_evomoe/. "$site/fairseq_evomoe"
config=$PWD/pyproject.toml
(cd "$site" && mypy --config-file "$config")
