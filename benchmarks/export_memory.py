"""Peak memory of an export, at Llama-3-8B's width: anonymous pages of the exporting process, by number of layers.

python benchmarks/export_memory.py [--layers 4 8] [--stage 3] [--ranks 8] [--scratch DIR]

Random checkpoints in DeepSpeed's layout (without the optimizer's moments, which are mapped and never read) are written,
exported in bf16 by a process of its own, and deleted: 8 layers need 17 GB of disk. The tests hold the layout against
checkpoints of the real engine. Mapped input pages are not counted: the system takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ropewalk.files import sha256_of
from ropewalk.model.rotary import place_position
from ropewalk.rope import Position, RopeChain

EXPORT = "from pathlib import Path; import sys; from ropewalk.export import write_export; write_export(Path(sys.argv[1]), Path(sys.argv[2]), 'bfloat16', overwrite=False)"  # noqa: E501
BLOCK = 2**22  # random weights, repeated


def main() -> None:
    """Print one line for each number of layers, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--stage", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--scratch", type=Path, default=Path("export-memory"))
    given = parser.parse_args()
    peaks = [measure(layers, given.stage, given.ranks, given.scratch) for layers in given.layers]
    print(f"largest / smallest peak: {max(peaks) / min(peaks):.3f}")


def measure(layers: int, stage: int, ranks: int, scratch: Path) -> int:
    """Peak anonymous bytes of one export."""
    checkpoint = scratch / "run" / "checkpoints" / "step-00000001"
    try:
        weights = write_checkpoint(checkpoint, layers, stage, ranks)
        before = time.monotonic()
        peak = peak_of([sys.executable, "-c", EXPORT, str(checkpoint), str(scratch / "export")])
        seconds = time.monotonic() - before
        written = sum(path.stat().st_size for path in (scratch / "export").glob("*.safetensors"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(
        f"ZeRO-{stage}, {ranks} ranks, {layers} layers: {weights / 1e9:.2f}B weights, {written / 2**30:.2f} GiB "
        f"written, peak RssAnon {peak / 2**30:.2f} GiB, {seconds:.0f} s",
        flush=True,
    )
    return peak


def write_checkpoint(checkpoint: Path, layers: int, stage: int, ranks: int) -> int:
    """A committed checkpoint of random weights; returns how many."""
    config = AutoConfig.for_model(
        "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=65536,
    )  # fmt: skip
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    chain = RopeChain([{"method": "abf", "theta": 1e7}, {"method": "cope", "clip": 20}])
    position = Position("cope20", chain, 5e5, 128, 8192, 65536)
    place_position(config, position)
    config.architectures = ["LlamaForCausalLM"]
    config.ropewalk, config.dtype = position.metadata(), torch.bfloat16
    with torch.device("meta"):
        shapes = {f"lm.{n}": p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    (checkpoint / "zero").mkdir(parents=True)
    (checkpoint / "config.json").write_text(config.to_json_string(use_diff=False))
    groups = [{n: s for n, s in shapes.items() if (len(s) >= 2) is matrices} for matrices in (True, False)]
    write_shards(checkpoint / "zero", groups, stage, ranks)
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "step": 1, "contract": {}, "files": files}))
    return sum(shape.numel() for shape in shapes.values())


def write_shards(directory: Path, groups: list[dict[str, torch.Size]], stage: int, ranks: int) -> None:
    """The files of every rank, one rank's vectors in memory at a time."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    sizes = [sum(-(-shape.numel() // ranks) for shape in group.values()) for group in groups]  # a rank's share
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank in range(ranks):
        vectors = [block.repeat(-(-size // BLOCK))[:size].clone() for size in sizes]
        state = {"zero_stage": stage, "partition_count": ranks if stage == 3 else [ranks] * len(groups), key: vectors}
        torch.save({"optimizer_state_dict": state}, directory / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    torch.save({"param_shapes": groups, "module": {}, "buffer_names": []}, directory / name)


def peak_of(command: list[str]) -> int:
    """The largest RssAnon of a process, bytes, looked at every 10 ms."""
    peak, process = 0, subprocess.Popen(command)
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except FileNotFoundError:
            break
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
        peak = max([peak, *found])
        time.sleep(0.01)
    if process.wait() != 0:
        sys.exit(f"the export ended with exit code {process.returncode}")
    return peak


if __name__ == "__main__":
    main()
