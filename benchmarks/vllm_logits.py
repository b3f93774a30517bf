"""Whether vLLM as a whole computes an export's log-probabilities: run by an interpreter that has it.

python benchmarks/transformers4.py --make DIR                       (with this project's own interpreter)
VLLM_PYTHON benchmarks/vllm_logits.py DIR-base DIR/rope DIR/cope DIR/hardclip DIR/cope_yarn4
VLLM_PYTHON benchmarks/vllm_logits.py "" EXPORT

The first argument is a checkpoint with the same weights and a plain config, or "": it is served with each export's own
position given as ``--hf-overrides``, and once without, which must differ. Everything is compared with the stock
transformers of the same environment, in float32, on TOKENS tokens or as many as the export serves.
"""

import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = 9216  # past the tiny model's original 8,192
AGREES = 1e-3  # of the log-probabilities' standard deviation
CHUNK = 2048  # tokens whose logits are in memory at once


def main(base: str, *exports: str) -> int:
    """Print a line an export; the exit code says whether all agreed and all controls differed."""
    return 0 if all([compare(base, export) for export in exports]) else 1


def compare(base: str, export: str) -> bool:
    """One export; the control is left out where the export rotates as the base does."""
    config = AutoConfig.from_pretrained(export)
    tokens = np.arange(min(TOKENS, config.max_position_embeddings - 1)) * 7 % min(512, config.vocab_size)
    expected = by_transformers(export, tokens)
    found, control = {"the export": by_vllm(export, tokens)}, {}
    if base:
        length = {"max_position_embeddings": config.max_position_embeddings}
        found["base, overridden"] = by_vllm(base, tokens, {"rope_parameters": config.rope_parameters, **length})
        if AutoConfig.from_pretrained(base).rope_parameters != config.rope_parameters:
            control["control: base, plain"] = by_vllm(base, tokens, length)
    apart = {name: float(np.abs(v - expected).max() / expected.std()) for name, v in (found | control).items()}
    said = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
    print(f"RESULT {export}: {len(tokens)} tokens; off by, of their standard deviation: {said}", flush=True)
    return all(apart[name] <= AGREES for name in found) and all(apart[name] > 100 * AGREES for name in control)


def by_transformers(directory: str, tokens: np.ndarray) -> np.ndarray:
    """Log-probability of each token but the first."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids, found = torch.from_numpy(tokens), []
    with torch.no_grad():
        states = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
        for block, wanted in zip(states.split(1024), ids[1:].split(1024), strict=True):
            found.append(model.lm_head(block).log_softmax(-1).gather(-1, wanted[:, None])[:, 0])
    return torch.cat(found).double().numpy()


def by_vllm(directory: str, tokens: np.ndarray, overrides: dict | None = None) -> np.ndarray:
    """The same of vLLM's engine, the prompt read in chunks."""
    import vllm

    length = len(tokens) + 1
    engine = vllm.LLM(
        model=directory, hf_overrides=overrides, dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=length, max_num_batched_tokens=CHUNK, max_num_seqs=1, kv_cache_memory_bytes=2**30,
    )  # fmt: skip
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    (answer,) = engine.generate([{"prompt_token_ids": tokens.tolist()}], sampling)
    wanted = zip(answer.prompt_logprobs[1:], tokens[1:].tolist(), strict=True)
    return np.array([found[token].logprob for found, token in wanted])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
