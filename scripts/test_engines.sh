#!/usr/bin/env bash
# Tests exports, imports and clients in the engines that run them, which the ordinary tests skip
# where they are not installed. Takes about 3 GB of disk for an environment of its own.
#
#   ./scripts/test_engines.sh                       the newest release of every engine
#   ./scripts/test_engines.sh transformers==5.0.0   with this release; any requirements of pip

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"
export VENV=${VENV:-.venv-engines} HF_HUB_OFFLINE=1
set_up dev eval
# On every call: set_up installs what constraints.txt pins, and nothing twice.
newest=(torch transformers accelerate tokenizers safetensors onnx onnxruntime gguf xllamacpp
  "lm_eval[api]" openai langchain-openai)
python -m pip install --quiet --upgrade --upgrade-strategy eager \
  --extra-index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" "${newest[@]}"
if (($#)); then
  python -m pip install --quiet "$@"
fi
# An engine that cannot be imported would only skip its tests.
python - <<'PYTHON'
import importlib
import importlib.metadata

for name in (
    *("torch", "transformers", "accelerate", "tokenizers", "safetensors", "onnx", "onnxruntime"),
    *("gguf", "xllamacpp", "lm_eval", "openai", "langchain_openai"),
):
    importlib.import_module(name)
    print(name, importlib.metadata.version(name))
PYTHON
exec pytest --numprocesses 2 --dist worksteal \
  tests/exporting tests/evaluating tests/serving/test_clients.py
