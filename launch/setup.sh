# shellcheck shell=bash
# Sourced by the scripts beside it: enters the project's root and defines
#
#   set_up [extra …]      create a virtual environment for this machine and activate it
#
# The environment is .venv, with the first suitable Python found. VENV and PYTHON choose others:
#   VENV=.venv312 PYTHON=python3.12 ./launch/test.sh

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Prints the first Python ≥ 3.11 that can make environments; tested versions come first.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
    # It must run, not only exist: version managers leave stubs for inactive versions.
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer with the venv module found (tried: ${PYTHON:-python3.11," \
    "python3.12, python3.13, python3, python}); install one (on Debian and Ubuntu:" \
    "apt install python3 python3-venv) or name it: PYTHON=/path/to/python $0" >&2
  return 1
}

# True where a TPU chip is attached: Google's PCI vendor id with a TPU's device id.
has_tpu() {
  [[ -e /dev/accel0 ]] && return
  local device
  for device in /sys/bus/pci/devices/*; do
    [[ -r $device/vendor && $(<"$device/vendor") == 0x1ae0 ]] || continue
    case $(<"$device/device") in
      0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) return 0 ;;
    esac
  done
  return 1
}

# Prints the extra that this machine's accelerator needs, or nothing for a CPU.
accelerator_extra() {
  local driver capability
  if driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) &&
    [[ $driver =~ ^([0-9]+)\. ]]; then
    driver=${BASH_REMATCH[1]}
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
      sort -n | head -n 1 | tr -cd 0-9 || true)
    # CUDA 13 needs driver 580 and a GPU of compute capability 7.5 or newer; CUDA 12 driver 525.
    if ((driver >= 580 && ${capability:-75} >= 75)); then
      echo cuda13
    elif ((driver >= 525)); then
      echo cuda12
    else
      echo "warning: NVIDIA driver $driver is too old for JAX (525 or newer); using the CPU" >&2
    fi
  elif has_tpu; then
    echo tpu
  fi
}

# Creates the environment and installs into it, unless its stamp shows that this was done.
set_up() {
  local venv=${VENV:-.venv} stamp want version extras python
  local -a options=(--disable-pip-version-check)
  extras=$(printf '%s\n' "$(accelerator_extra)" "$@" | sed '/^$/d' | sort -u | paste -sd, -)
  stamp=$venv/installed
  want="$(cat pyproject.toml constraints.txt | cksum) [$extras]"
  if ! grep -qxF -- "$want" "$stamp" 2>/dev/null; then
    # Checks for pip: an environment whose creation was interrupted has Python but no pip.
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
      python=$(find_python)
      echo "Creating $venv with $("$python" --version)"
      "$python" -m venv "$venv"
    fi
    version=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    case $version in
      3.11 | 3.12) options+=(--constraint constraints.txt) ;;
      *) echo "Python $version: using the newest packages, constraints.txt pins none for it" ;;
    esac
    [[ -t 1 ]] || options+=(--quiet)
    echo "Installing mamba_jax${extras:+ with $extras} into $venv (some minutes the first time)"
    "$venv/bin/python" -m pip install "${options[@]}" --editable ".${extras:+[$extras]}"
    # One line for each set of extras, so that one script does not undo the other's stamp.
    { grep -F -- "${want% \[*} " "$stamp" 2>/dev/null || true; echo "$want"; } >"$stamp.new"
    mv "$stamp.new" "$stamp"
  fi
  # shellcheck disable=SC1091
  source "$venv/bin/activate"
}
