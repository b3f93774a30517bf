"""Peak memory of the loss, forward and backward, at Llama 3's vocabulary of 128,256.

python benchmarks/loss.py [--width 64] [--chunk-size 512]

Each line is a fresh process: the resident memory that the loss adds to the hidden states, the head and room for their
gradients. The plain form holds every logit, so it is measured at few tokens and said per token. Needs 3 GiB.
"""

import argparse
import ctypes
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from ropewalk.model.loss import tiled_linear_cross_entropy

VOCABULARY = 128_256
MIB = 2**20


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_over(base: int, work) -> tuple[int, float]:
    """Bytes over ``base`` that ``work()`` reached, sampled every 2 ms, and its seconds."""
    peak, done = base, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return peak - base, seconds


def measure(form: str, tokens: int, width: int, chunk_size: int) -> None:
    """Print bytes and seconds of one loss with its backward pass."""
    ctypes.CDLL(None).mallopt(-3, 4 * MIB)  # freed blocks go back to the system, as in a run (training/engine.py)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width)
    weight = torch.randn(VOCABULARY, width) * width**-0.5
    labels = torch.randint(0, VOCABULARY, (tokens,))
    for x in (hidden, weight):
        x.requires_grad_().grad = torch.ones_like(x)  # the gradients themselves are part of the base

    def work() -> None:
        if form == "tiled":
            loss = tiled_linear_cross_entropy(hidden, weight, labels, chunk_size)
        else:
            loss = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
        loss.backward()

    over, seconds = peak_over(resident(), work)
    print(over, seconds)


def main() -> None:
    """Print one line for each form and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64, help="channels of the hidden states")
    parser.add_argument("--chunk-size", type=int, default=512, help="tokens whose logits exist at once")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.measure:
        measure(told.measure[0], int(told.measure[1]), told.width, told.chunk_size)
        return
    options = [f"--width={told.width}", f"--chunk-size={told.chunk_size}"]
    print(f"fp32, vocabulary {VOCABULARY:,}, width {told.width}, chunks of {told.chunk_size} tokens")
    for form, tokens in (("plain", 512), ("plain", 1024), *(("tiled", 2**n) for n in range(12, 17))):
        command = [sys.executable, __file__, *options, "--measure", form, str(tokens)]
        over, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        peak = int(over) / MIB
        print(f"  {form}  {tokens:6,} tokens  {peak:7.0f} MiB  {peak / tokens:6.3f} per token  {float(seconds):6.1f} s")


if __name__ == "__main__":
    main()
