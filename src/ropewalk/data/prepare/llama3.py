"""Llama 3's tokenizer.model as a tokenizer.json: ``python -m ropewalk.data.prepare.llama3 DIRECTORY``."""

from __future__ import annotations

import sys
from pathlib import Path

from ropewalk.data.prepare.engines import read_ranks
from ropewalk.data.prepare.tokenizer import BOS, EOS
from ropewalk.data.store.tokenizer_files import RANKS, has_ranks
from ropewalk.errors import UserError

# Llama 3.0's list; later releases gave some of the reserved ones names, at the same ids.
SPECIAL = (
    BOS,
    EOS,
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)


def convert(directory: Path, special: tuple[str, ...] = SPECIAL) -> None:
    """Write tokenizer.json and tokenizer_config.json beside tokenizer.model; BOS is put before each text, as Meta does.

    Raises:
        UserError: where there is no tokenizer.model of tiktoken's form.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    if not has_ranks(directory):
        raise UserError(f"{directory} has no {RANKS} of tiktoken's form; fetch it with fetch_llama3_tokenizer.sh")

    class Converter(TikTokenConverter):
        """transformers' own, without its need of tiktoken to read the file."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return read_ranks(Path(tiktoken_url))

    tokenizer = Converter(str(directory / RANKS), extra_special_tokens=list(special)).converted()
    bos = tokenizer.token_to_id(BOS)
    begin = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS).save_pretrained(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
