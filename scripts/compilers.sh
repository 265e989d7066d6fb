#!/usr/bin/env bash
# Installs compilers for GPUs and TPUs into .compilers; this machine needs no such device. With them,
# the tests compile the kernels for real cards and read their memory and registers from the result.
#
#   ./scripts/compilers.sh                                   about 1 GB
#   PYTHONPATH=.compilers JAX_PLATFORMS=cpu python …          to use them (see mamba_jax/estimator/targets.py)
#
# They stay outside the environment, where jax would try to start them as backends each time.

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"
set_up dev
folder=.compilers
# The versions that go with the installed jax, as its own extras name them.
mapfile -t packages < <(python - <<'EOF'
import importlib.metadata as metadata

version = metadata.version("jax")
libtpu = next(line for line in metadata.requires("jax") if line.startswith("libtpu"))
print(f"jax-cuda12-pjrt=={version}")
print(f"jax-cuda12-plugin=={version}")
print("nvidia-cuda-nvcc-cu12==12.9.*")  # ptxas and libdevice
print(libtpu.partition(";")[0].replace(" ", ""))
EOF
)
want="$(python --version) ${packages[*]}"
if [[ $(cat "$folder/installed" 2>/dev/null) == "$want" ]]; then
  echo "$folder is up to date: ${packages[*]}"
  exit
fi
rm -rf "$folder"
python -m pip install --disable-pip-version-check --quiet --no-deps --target "$folder" "${packages[@]}"
echo "$want" >"$folder/installed"
echo "Installed into $folder: ${packages[*]}"
