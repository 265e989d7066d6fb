#!/usr/bin/env bash
# The checks of a change, in the environment of launch/test.sh.
#
#   ./scripts/check.sh lint           lint, format and types
#   ./scripts/check.sh quick          lint, and the tests that find most mistakes soonest
#   ./scripts/check.sh shard 2 4      the second quarter of all tests
#   ./scripts/check.sh exhaustive     the tests between cases that always run
#   ./scripts/check.sh wheel          build the wheel, install it alone, and call it

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

lint() {
  ruff check .
  ruff format --check .
  pyright
}

# The files of tests, dealt out in turns by size, so that shards take about as long.
shard() {
  local number=$1 of=$2
  git ls-files -z 'tests/**/test_*.py' 'tests/test_*.py' | xargs -0 ls -S |
    awk -v number="$number" -v of="$of" 'NR % of == number % of'
}

wheel() {
  local folder
  folder=$(mktemp -d)
  python -m pip wheel --quiet --no-deps --wheel-dir "$folder" .
  "$(find_python)" -m venv "$folder/venv"
  "$folder/venv/bin/python" -m pip install --quiet --constraint constraints.txt "$folder"/*.whl
  # From elsewhere: what lies in the checkout must not stand in for what the wheel lacks.
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
      tests/models/test_golden.py tests/training/test_step.py tests/training/test_loss.py \
      tests/checkpoints tests/data/test_windows.py tests/data/test_split.py tests/generation/test_sampling.py
    ;;
  shard)
    set_up dev
    mapfile -t files < <(shard "$2" "$3")
    exec pytest --numprocesses 2 --dist worksteal "${files[@]}"
    ;;
  exhaustive)
    set_up dev
    exec pytest --numprocesses 2 --dist worksteal -m exhaustive
    ;;
  wheel) set_up dev && wheel ;;
  *)
    sed -n 's/^#   //p' "$0" >&2
    exit 2
    ;;
esac
