#!/usr/bin/env bash
# From a fresh checkout to a trained model: sets up .venv, then trains a small hybrid on Python's
# own source.
#
#   ./launch/quickstart.sh                                 run it again to resume
#   ./launch/quickstart.sh --config.training.max_steps=50  every config field can be overridden

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck disable=SC2119  # it takes no extras, and the arguments are for training
set_up
exec python -m mamba_jax.train --config=configs/quickstart.py --resume auto "$@"
