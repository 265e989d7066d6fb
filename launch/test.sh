#!/usr/bin/env bash
# Checks the project: lint, format, types and tests, in a virtual environment that it creates.
#
#   ./launch/test.sh                  everything
#   ./launch/test.sh tests/ops -x     arguments go to pytest

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up dev
ruff check .
ruff format --check .
pyright
# worksteal: each worker starts with half of the files, so that both do not compile the same.
exec pytest --numprocesses 2 --dist worksteal "$@"
