"""What the forkserver of ranks.py imports once, for every rank that is forked from it: all that train.py does."""

from transformers.models.llama import modeling_llama  # noqa: F401

import ropewalk.cli
import ropewalk.evaluation  # noqa: F401
from ropewalk.training.distributed import import_deepspeed
from ropewalk.training.trainer import train  # noqa: F401

import_deepspeed("cpu")
