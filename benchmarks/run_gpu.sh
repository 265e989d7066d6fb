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

# Seconds after which a benchmark begins nothing new; with the longest single case they may take
# half as long again, hence the second limit, at which it is ended as by Ctrl-C and keeps its rows.
declare -A budget_secs=([scan]=120 [train]=75 [decode]=45 [hybrid]=45 [scaling]=40 [startup]=45)
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

attempt autotune 60 python -m mamba_jax.autotune --quick
for name in "${benchmarks[@]}"; do
  budget=${budget_secs[$name]:-60}
  attempt "$name" $((budget * 3 / 2)) \
    python -m benchmarks.run "$name" --budget_secs "$budget"
done
attempt "gpu tests" 90 python -m pytest -q -m gpu

echo "── results"
ls benchmarks/results
if ((${#failed[@]})); then
  echo "run_gpu.sh: failed or cut short: ${failed[*]}"
  exit 1
fi
