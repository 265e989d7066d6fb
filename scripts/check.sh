#!/usr/bin/env bash
# The checks of a change, in the environment of launch/test.sh.
#
#   ./scripts/check.sh lint           lint, format and types
#   ./scripts/check.sh quick          lint and the most useful tests, in under two minutes
#   ./scripts/check.sh shard 2 4      the second quarter of all tests
#   ./scripts/check.sh files 2 4      its files
#   ./scripts/check.sh exhaustive     the tests between cases that always run
#   ./scripts/check.sh wheel          build the wheel, install it alone, and call it

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

lint() {
  ruff check .
  ruff format --check .
  pyright
}

# Prints the test files of one shard of several. Files are dealt out in turn, largest first, so that
# all shards take about equally long.
files() {
  local number=${1:-} of=${2:-}
  if [[ ! $number =~ ^[1-9][0-9]*$ || ! $of =~ ^[1-9][0-9]*$ ]] || ((number > of)); then
    echo "error: no shard ${number:-?} of ${of:-?}; give its number and how many there are: 2 4" >&2
    return 2
  fi
  find tests -name 'test_*.py' -print0 | LC_ALL=C xargs -0 ls -S |
    awk -v number="$number" -v of="$of" 'NR % of == number % of'
}

wheel() {
  local folder
  folder=$(mktemp -d)
  python -m pip wheel --quiet --no-deps --wheel-dir "$folder" .
  "$(find_python)" -m venv "$folder/venv"
  "$folder/venv/bin/python" -m pip install --quiet --constraint constraints.txt "$folder"/*.whl
  # Not from the checkout: its files would stand in for files that the wheel lacks.
  (cd "$folder" && venv/bin/mamba-jax --version && venv/bin/mamba-jax --help >/dev/null)
  rm -r "$folder"
}

case ${1:-} in
  lint)
    set_up dev
    lint
    ;;
  quick)
    set_up dev
    lint
    exec pytest --numprocesses 2 --dist worksteal -m "not slow and not exhaustive" \
      tests/test_imports.py tests/test_public.py tests/test_project.py tests/cli tests/ops/test_causal_conv1d.py \
      tests/models/test_golden.py tests/training/test_loss.py \
      tests/training/test_step.py::test_accumulation_equals_the_full_batch \
      tests/checkpoints tests/data/test_windows.py tests/data/test_split.py tests/generation/test_sampling.py
    ;;
  files) files "${@:2}" ;;
  shard)
    listed=$(files "${@:2}")
    set_up dev
    # shellcheck disable=SC2086
    exec pytest --numprocesses 2 --dist worksteal $listed
    ;;
  exhaustive)
    set_up dev
    exec pytest --numprocesses 2 --dist worksteal -m exhaustive
    ;;
  wheel)
    set_up dev # not before &&, where bash ignores failures inside a function
    wheel
    ;;
  *)
    sed -n 's/^#   //p' "$0" >&2
    exit 2
    ;;
esac
