"""What the forkserver of ranks.py imports once, for every rank that is forked from it."""

from transformers.models.llama import modeling_llama  # noqa: F401

from ropewalk.training.distributed import import_deepspeed
from ropewalk.training.loop import train  # noqa: F401

import_deepspeed("cpu")
