"""Probe of llama.cpp: runs GGUF files, unable to import ropewalk.

python -I llama_probe.py JOB.json

JOB.json: {"tokens": TOKENS.npy, "rows": ROWS.npy, "text": text of the tokens, "models": {GGUF file: ANSWER.npz}}
"""

import sys

sys.modules["ropewalk"] = None  # type: ignore[assignment]  # from here on `import ropewalk` fails

import json
import os
from pathlib import Path

import cyllama.llama.llama_cpp as llama
import numpy as np

BATCH = 512


class Model(llama.LlamaModel):
    """cyllama 0.2.18's contexts look for the size of the vocabulary here."""

    @property
    def n_vocab(self) -> int:
        """Entries of the vocabulary."""
        return int(self.get_vocab().n_vocab)


def main(job: str) -> None:
    """Write logits, float32 (rows, vocabulary), and the text's tokens as llama.cpp makes them, int64 (n,)."""
    llama.disable_logging()
    given = json.loads(Path(job).read_text(encoding="utf-8"))
    tokens, rows = np.load(given["tokens"]).tolist(), set(np.load(given["rows"]).tolist())
    for file, answer in given["models"].items():
        model = Model(path_model=file, params=_model_params(), verbose=False)
        own = model.get_vocab().tokenize(given["text"], False, False)
        np.savez(answer, logits=_logits(model, tokens, rows), tokens=np.array(own, dtype=np.int64))
    sys.stdout.flush()
    os._exit(0)  # ggml's threads and Python's teardown do not always agree


def _model_params() -> llama.LlamaModelParams:
    params = llama.LlamaModelParams()
    params.n_gpu_layers = 0
    return params


def _logits(model: Model, tokens: list[int], rows: set[int]) -> np.ndarray:
    params = llama.LlamaContextParams()
    params.n_ctx = -(-len(tokens) // 256) * 256
    params.n_batch = params.n_ubatch = BATCH
    params.type_k = params.type_v = 0  # GGML_TYPE_F32: the cache rounds nothing
    params.flash_attn_type = 0  # off: it sums in float16
    params.n_threads = params.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    context = llama.LlamaContext(model, params, verbose=False)
    logits = []
    for start in range(0, len(tokens), BATCH):
        part = tokens[start : start + BATCH]
        batch = llama.LlamaBatch(n_tokens=len(part), embd=0, n_seq_max=1)
        for i, token in enumerate(part):
            batch.add(token, start + i, [0], start + i in rows)
        context.decode(batch)
        wanted = [i for i in range(len(part)) if start + i in rows]
        logits += [np.array(context.get_logits_ith(i), dtype=np.float32) for i in wanted]
    return np.stack(logits)


if __name__ == "__main__":
    main(sys.argv[1])
