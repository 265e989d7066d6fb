#!/usr/bin/env bash
# Measures everything that waits for a GPU, within ten minutes after the installation:
# the tests marked gpu, a quick tuning of the kernels, and every benchmark.
#
#   ./benchmarks/run_gpu.sh             all
#   ./benchmarks/run_gpu.sh scan train  only these benchmarks
#
# Leaves benchmarks/results/*; a part that fails or runs too long does not stop the others.

if ! nvidia-smi --query-gpu=name --format=csv,noheader >/dev/null 2>&1; then
  echo "run_gpu.sh: this machine has no NVIDIA GPU (nvidia-smi finds none)"
  exit 1
fi
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"
set_up bench dev

# Seconds after which a benchmark begins nothing new. What it has begun may take a quarter longer;
# then it is ended as by Ctrl-C and keeps its rows. With 50 s of tuning and 60 s of tests: 573 s.
declare -A budget_secs=([scan]=100 [train]=60 [decode]=40 [hybrid]=100 [scaling]=35 [startup]=35)
benchmarks=("$@")
((${#benchmarks[@]})) || benchmarks=(scan train decode hybrid scaling startup)
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/mamba_jax/compiled}

failed=()
attempt() { # NAME SECONDS COMMAND…: runs a part with a time limit and remembers whether it failed
  local name=$1 limit=$2
  shift 2
  echo "── $name"
  timeout --signal=INT --kill-after=20 "$limit" "$@" || failed+=("$name")
}

attempt autotune 50 python -m mamba_jax.autotune --quick
for name in "${benchmarks[@]}"; do
  budget=${budget_secs[$name]:-60}
  attempt "$name" $((budget * 5 / 4)) \
    python -m benchmarks.run "$name" --budget_secs "$budget"
done
attempt "gpu tests" 60 env TEST_PLATFORM=cuda python -m pytest -q -m gpu

echo "── results"
ls benchmarks/results
if ((${#failed[@]})); then
  echo "run_gpu.sh: failed or cut short: ${failed[*]}"
  exit 1
fi
