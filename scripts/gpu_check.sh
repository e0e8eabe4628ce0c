#!/usr/bin/env bash
# linchain on one GPU, in at most ten minutes: losses, speed and memory beside PEFT and TRL, a killed run, NCCL.
#
#     scripts/gpu_check.sh [--model SMOLLM2_DIRECTORY] [--out DIR] [--tiny]
#
# Environment: PYTHON, the interpreter that has linchain's dependencies (that of .venv, else python3).

set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || [ -n "${PYTHON:-}" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # linchain itself need not be installed
exec "$python" -m scripts.gpu_check "$@"
