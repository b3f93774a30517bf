"""Document attention on CPU against stock sdpa with packed position ids: time and memory, forward and backward.

python benchmarks/attention.py [--rounds 3]

One layer of the demo's kind (8 heads of 64 channels over 2 key/value heads), a row of eight documents of uneven length.
Times at 16,384 tokens are processor time on one thread, of interleaved rounds in one process (limit: 5 times faster);
memory is the peak that a fresh process adds, at each length.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from loss import MIB, peak_over, resident
from transformers import LlamaConfig, LlamaModel

from ropewalk.model import attention

TOKENS = 16_384
SHARES = (0.22, 0.03, 0.16, 0.09, 0.18, 0.06, 0.12, 0.14)  # of the row, for each document


def model_of(implementation: str) -> LlamaModel:
    """One decoder layer whose MLP and projections are too small to matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        head_dim=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
        attn_implementation=implementation,
    )
    return LlamaModel(config)


def step_of(name: str, tokens: int):
    """A function that runs forward and backward on a packed row and returns the output."""
    bounds = [round(tokens * sum(SHARES[:i])) for i in range(len(SHARES))] + [tokens]
    cu_seqlens = torch.tensor(bounds)
    documents = attention.Documents.from_cu_seqlens(cu_seqlens, torch.device("cpu"))
    extra = {"documents": documents} if name == "ours" else {}
    model = model_of(attention.register() if name == "ours" else "sdpa")
    ids = torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()])[None]

    def step() -> torch.Tensor:
        out = model(input_ids=ids, position_ids=positions, use_cache=False, **extra).last_hidden_state
        out.square().mean().backward()
        return out.detach()

    return step


def compare_times(rounds: int) -> None:
    """Print the medians of interleaved rounds and their ratio; the outputs must agree."""
    steps = {name: step_of(name, TOKENS) for name in ("ours", "stock")}
    times: dict[str, list[float]] = {name: [] for name in steps}
    outputs = {}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            outputs[name] = step()
            times[name].append(time.process_time() - start)
    difference = (outputs["ours"] - outputs["stock"]).abs().max().item()
    ratios = [stock / ours for ours, stock in zip(times["ours"], times["stock"], strict=True)]
    ours, stock = (statistics.median(times[name]) for name in ("ours", "stock"))
    print(
        f"{TOKENS:,} tokens in {len(SHARES)} documents, median of {rounds} rounds; largest difference {difference:.1e}"
    )
    print(
        f"  ours {ours:.2f} s, stock sdpa {stock:.2f} s: {stock / ours:.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
    )


def main() -> None:
    """Print times, then memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    told = parser.parse_args()
    torch.set_num_threads(1)
    if told.measure:
        step = step_of(told.measure[0], int(told.measure[1]))
        step_of(told.measure[0], 256)()  # what is loaded at first use is no part of the peak
        print(peak_over(resident(), step)[0])
        return
    compare_times(told.rounds)
    print("peak memory over the base")
    for name in ("ours", "stock"):
        for tokens in (TOKENS // 4, TOKENS // 2, TOKENS):
            command = [sys.executable, __file__, "--measure", name, str(tokens)]
            peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(f"  {name:5}  {tokens:6,} tokens  {peak / MIB:6.0f} MiB  {peak / tokens / 1024:5.1f} KiB per token")


if __name__ == "__main__":
    main()
