#!/usr/bin/env bash
# Trains in the background: the run outlives the terminal, and only one runs in an output_dir.
#
#   ./launch/train_background.sh --model_size medium --data_dir ./data    any flag of mamba_jax.train
#   ./launch/train_background.sh --status                                 … --stop, --requeue, --help
#
# It may also be called from inside launch/; relative paths count from the folder above it.
set -euo pipefail
scripts=$(dirname "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for python in "${VENV:-.venv}/bin/python" python3 python ""; do
  command -v "$python" >/dev/null && break
done
if [[ -z $python ]]; then
  echo "error: no Python found; ./launch/quickstart.sh and ./launch/test.sh make a .venv" >&2
  exit 2
fi
exec "$python" -m mamba_jax.background --scripts="$scripts" "$@"
