#!/usr/bin/env bash
# Prepares one machine for this repository: uv, Python 3.12, and jaxgpt with the extra for its chips. Safe to run again.
#
#     tpu/setup_vm.sh [tpu|cuda]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-tpu}

PATH=$HOME/.local/bin:$PATH
if ! command -v uv >/dev/null; then
    python3 -m pip install --quiet --user uv
fi
uv sync --quiet --python 3.12 --extra "$extra"
.venv/bin/jaxgpt --version
