#!/usr/bin/env bash
# Trains on a Cloud TPU VM of one host (v5litepod-1 to -8, v6e-1 to -8), from this machine.
#
#   ./launch/tpu_vm.sh create                 a VM
#   ./launch/tpu_vm.sh start [flags]          copies the project there and trains in the background
#   ./launch/tpu_vm.sh status | logs | stop   the run's state or log; stop saves first
#   ./launch/tpu_vm.sh fetch                  checkpoints, logs and curves, to this machine
#   ./launch/tpu_vm.sh delete                 the VM, with all that is on it
#
# Settings come from the environment: TPU_NAME (mamba), TPU_ZONE (us-west4-a), TPU_TYPE
# (v5litepod-4), TPU_IMAGE (v2-alpha-tpuv5-lite), TPU_SPOT=1 for a cheaper one that may be
# preempted. It needs gcloud, logged in with a project that has TPU quota, and it costs money from
# create to delete.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage() { sed -n "2,/^set /s/^# \{0,1\}//p" launch/tpu_vm.sh; }
name=${TPU_NAME:-mamba} zone=${TPU_ZONE:-us-west4-a}
type=${TPU_TYPE:-v5litepod-4} image=${TPU_IMAGE:-v2-alpha-tpuv5-lite}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit
fi
if ! command -v gcloud >/dev/null; then
  echo "error: gcloud is not installed; see cloud.google.com/sdk/docs/install" >&2
  exit 2
fi
tpu() { gcloud compute tpus tpu-vm "$1" "$name" --zone="$zone" "${@:2}"; }
# Runs a command in the project's folder on the VM; quotes each word.
there() { tpu ssh --command="cd mamba_jax && $(printf '%q ' "$@")"; }

action=${1:-}
shift || true
case $action in
  create)
    tpu create --accelerator-type="$type" --version="$image" ${TPU_SPOT:+--spot}
    ;;
  start)
    # The files that git tracks, as they are here: no environment, checkpoints or caches.
    git ls-files -z | tar --create --gzip --null --files-from=- --file=- |
      tpu ssh --command="mkdir -p mamba_jax && tar --extract --gzip --directory=mamba_jax"
    there bash -c "source launch/setup.sh && set_up"
    there ./launch/train_background.sh "$@"
    ;;
  status | stop)
    there ./launch/train_background.sh "--$action" "$@"
    ;;
  logs)
    tpu ssh --command="cd mamba_jax && ./launch/view_training_log.sh" -- -t
    ;;
  fetch)
    there tar --create --gzip --ignore-failed-read checkpoints logs runs | tar --extract --gzip
    ;;
  delete)
    tpu delete "$@"
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
