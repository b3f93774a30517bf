"""Whether transformers 4 reads the position of an export: run by an interpreter whose transformers is one.

python benchmarks/transformers4.py --make DIR        (with this project's own interpreter)
OLD_PYTHON benchmarks/transformers4.py --read DIR    (with that of transformers 4.45 to 4.57 and torch, nothing else)

``--make`` writes a tiny Llama under several chains, and a tiny Qwen2-VL under three arms of images and videos, with
what stock transformers 5 computes for them. ``--read`` loads them with whatever transformers it finds and compares the
frequencies, the attention scaling and the logits.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

CHAINS = {
    "rope": [],
    "abf": [{"method": "abf", "theta": 1e7}],
    "cope": [{"method": "abf", "theta": 1e7}, {"method": "cope", "clip": 12}],
    "hardclip": [{"method": "hardclip", "clip": 10}],
    "cope_yarn4": [
        {"method": "cope", "clip": 10},
        {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
    ],
    "yarn4": [{"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}],
    "pi4": [{"method": "pi", "factor": 4.0}],
    "llama3": [{"method": "llama3"}],
}
LENGTH = 512
VIDEO_ARMS = ("mrope", "hope_video", "cope_mrope")
GRID = (6, 4, 6)  # patches; a quarter as many tokens


def main() -> int:
    """Make or read; the exit code says whether everything agreed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path)
    parser.add_argument("--read", type=Path)
    given = parser.parse_args()
    if given.make:
        make(given.make)
        return 0
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    return 0 if all([read(directory) for directory in sorted(given.read.iterdir())]) else 1


def make(root: Path) -> None:
    """One directory a chain, exported from the same random weights."""
    from ropewalk.config.groups import RopeConfig
    from ropewalk.export.hf import write_hf
    from ropewalk.export.source import converted_source

    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=8192, initializer_range=0.1,
    )  # fmt: skip
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root.with_name(f"{root.name}-base"))
    for name, chain in CHAINS.items():
        source = converted_source(str(root.with_name(f"{root.name}-base")), RopeConfig(name=name, chain=chain))
        write_hf(source, root / name, None, overwrite=False)
        np.savez(root / name / "expected.npz", **computed(root / name))

    make_video(root)


def make_video(root: Path) -> None:
    """The same weights under each arm, in the form of an export."""
    from ropewalk.cli import composed
    from ropewalk.export.portable import place_portable, write_portable_config
    from ropewalk.rope import RopeChain
    from ropewalk.rope.position import position_of

    for name in VIDEO_ARMS:
        config = transformers.AutoConfig.for_model(
            "qwen2_vl", vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, image_token_id=508,
            video_token_id=509, initializer_range=0.1, rope_theta=1e4, tie_word_embeddings=False,
            rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
            vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 4,
                           "spatial_merge_size": 2, "temporal_patch_size": 2, "mlp_ratio": 2},
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        model.save_pretrained(root / name)
        chain = RopeChain.of(composed("train", [f"rope={name}"]).rope)
        position = position_of(config).continued(name, chain, LENGTH)
        write_portable_config(place_portable(model.config, position, LENGTH), root / name)
        np.savez(root / name / "expected.npz", **computed(root / name))


def computed(directory: Path) -> dict:
    """Frequencies, attention scaling and logits in the transformers at hand."""
    is_video = directory.name in VIDEO_ARMS
    kind = AutoModelForImageTextToText if is_video else AutoModelForCausalLM
    model = kind.from_pretrained(directory, torch_dtype=torch.float32, attn_implementation="eager").eval()
    inputs = {"input_ids": torch.arange(LENGTH)[None] * 7 % 512}
    if is_video:  # fractional positions, as no config makes them
        generator = torch.Generator().manual_seed(0)
        inputs["input_ids"] = inputs["input_ids"] % 508
        inputs["input_ids"][0, 9 : 9 + GRID[0] * GRID[1] * GRID[2] // 4] = 509
        inputs["position_ids"] = torch.randint(-8, 4 * LENGTH, (3, 1, LENGTH), generator=generator) / 4
        inputs["pixel_values_videos"] = torch.randn(GRID[0] * GRID[1] * GRID[2], 96, generator=generator)
        inputs["video_grid_thw"] = torch.tensor([GRID])
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0]
    rotary = model.get_decoder().rotary_emb
    return {
        "inv_freq": rotary.inv_freq.float().numpy(),
        "attention_scaling": np.float64(rotary.attention_scaling),
        "logits": logits.numpy(),
    }


def read(directory: Path) -> bool:
    """Compare one directory and print a line, which also says what other configs would give."""
    expected, found = dict(np.load(directory / "expected.npz")), computed(directory)
    apart = np.abs(found["inv_freq"] - expected["inv_freq"])
    relative = float(np.max(apart[expected["inv_freq"] > 0] / expected["inv_freq"][expected["inv_freq"] > 0]))
    zeros = np.array_equal(found["inv_freq"] == 0, expected["inv_freq"] == 0)
    logits = float(np.abs(found["logits"] - expected["logits"]).max() / expected["logits"].std())
    scaling = float(abs(found["attention_scaling"] / expected["attention_scaling"] - 1))
    same = zeros and relative <= 2.4e-7 and scaling <= 1e-7 and logits <= 1e-3
    content = json.loads((directory / "config.json").read_text())
    bare = {k: v for k, v in content.items() if k not in ("rope_theta", "rope_scaling")}
    if directory.name in VIDEO_ARMS:
        text = {k: v for k, v in content["text_config"].items() if k != "rope_scaling"}
        bare = {**content, "text_config": {**text, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}}
    controls = {"without the older form": bare}
    if directory.name == "yarn4":
        controls |= {f"as stock yarn served at {n:,}": stock_yarn(content, n) for n in (32768, 65536)}
    said = "; ".join(f"{name} logits {logits_of(directory, other, expected):.1e}" for name, other in controls.items())
    print(
        f"{'same' if same else 'OTHER':5}  {directory.name:11} frequencies {relative:.1e}, scaling {scaling:.1e}, "
        f"logits {logits:.1e} of their standard deviation; {said}",
        flush=True,
    )
    return same


def stock_yarn(content: dict, served: int) -> dict:
    """The config with YaRN as the stock entry: why exports do not hold it."""
    entry = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    return {**content, "rope_parameters": entry, "rope_scaling": entry, "max_position_embeddings": served}


def logits_of(directory: Path, content: dict, expected: dict) -> float:
    """Largest difference of the logits under another config.json, in their standard deviation."""
    path = directory / "config.json"
    kept = path.read_text()
    path.write_text(json.dumps(content))
    try:
        return float(np.abs(computed(directory)["logits"] - expected["logits"]).max() / expected["logits"].std())
    finally:
        path.write_text(kept)


if __name__ == "__main__":
    sys.exit(main())
