#!/usr/bin/env bash
# Llama 3's tokenizer without a hub account:  scripts/fetch_llama3_tokenizer.sh [DIRECTORY, by default data/llama3_tokenizer]
# Takes tokenizer.model from the llama-models wheel, leaves its licence beside it (Meta's; read it before you use or
# ship the file), and writes the tokenizer.json that transformers loads. Then: corpus.tokenizer=DIRECTORY
set -euo pipefail
cd "$(dirname "$0")/.."

directory=${1:-data/llama3_tokenizer}
python=${PYTHON:-.venv/bin/python}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m pip download --quiet --no-deps --dest "$scratch" llama-models==0.3.0
"$python" -m zipfile -e "$scratch"/llama_models-*.whl "$scratch/wheel"
mkdir -p "$directory"
cp "$scratch/wheel/llama_models/llama3/tokenizer.model" "$directory/"
cp "$scratch"/wheel/llama_models-*.dist-info/licenses/LICENSE "$directory/LICENSE"
"$python" - "$directory" <<'PYTHON'
import sys
from pathlib import Path

from ropewalk.data.prepare.engines import convert_llama3

convert_llama3(Path(sys.argv[1]))
PYTHON
