"""What one GPU can prove, in eight minutes; every part is a process of its own and one JSON line.

``python scripts/gpu_check.py``: all parts, into gpu_check.jsonl
``torchrun --standalone --nproc-per-node 8 scripts/gpu_check.py --ranks``: what several GPUs prove (NCCL, the end of a
rank that raises, memory of the allocator's streams, shared rows), into the same file
``python scripts/gpu_check.py --page docs/performance.md``: fill the page's section with the file
``--device cpu --small``: the same on a CPU, at sizes that prove nothing but that it runs

Needs the repository and what training imports, no network. Beside another torch see docs/performance.md.
"""

import argparse
import os
import sys
from pathlib import Path

from ropewalk.cluster.gpu_check.check_runner import LIMITS, RANK_LIMITS, emit, fill_page, run_parts


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.jsonl"))
    parser.add_argument("--parts", help=f"some of {', '.join([*LIMITS, *RANK_LIMITS])}, with commas between them")
    parser.add_argument("--ranks", action="store_true", help="the parts of several ranks, under torchrun")
    parser.add_argument("--page", type=Path, help="fill this page from the output file, and run nothing")
    parser.add_argument("--part", choices=(*LIMITS, *RANK_LIMITS), help=argparse.SUPPRESS)  # in this process
    return parser.parse_args()


def run_one(part: str, device: str, small: bool) -> None:
    """One part in this process."""
    import torch
    from torch.nn.attention import varlen

    from ropewalk.cluster.gpu_check import kernel_parts
    from ropewalk.model.load import exact_products

    exact_products()
    own = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device("cpu")
    varlen.varlen_attn = kernel_parts.adapted(varlen.varlen_attn)
    function = getattr(kernel_parts, part, None)
    if function is None:
        from ropewalk.cluster.gpu_check import engine_parts

        function = getattr(engine_parts, {"exit": "exit_with_peers_waiting"}.get(part, part))
    emit(function(own, small))


def main() -> None:
    """Run the parts, or one of them, or fill the page."""
    options = parse()
    if options.part:
        run_one(options.part, options.device, options.small)
    elif options.page:
        fill_page(options.output, options.page)
    else:
        parts = options.parts.split(",") if options.parts else list(RANK_LIMITS if options.ranks else LIMITS)
        shared = ["--device", options.device, *(["--small"] if options.small else [])]
        entries = run_parts(parts, shared, options.output)
        sys.exit(any("error" in entry for entry in entries) and not options.ranks)


if __name__ == "__main__":
    main()
