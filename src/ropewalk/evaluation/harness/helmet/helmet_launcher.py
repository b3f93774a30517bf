"""Launcher of HELMET's eval.py, run by HELMET's own python, with a given attention of the in-process model.

``python helmet_launcher.py CHECKOUT ATTENTION --config ...``. HELMET's HFModel takes flash_attention_2 if its caller
sets no other, and eval.py has no option for it. Nothing here imports ropewalk.
"""

import runpy
import sys
from typing import Any

checkout, attention = sys.argv[1:3]
sys.path[0] = checkout  # in place of this directory, whose modules are not HELMET's
sys.argv = [f"{checkout}/eval.py", *sys.argv[3:]]

import model_utils  # type: ignore[import-not-found]  # noqa: E402

_init = model_utils.HFModel.__init__


def _with_attention(self: Any, *arguments: Any, **options: Any) -> None:
    _init(self, *arguments, **{"attn_implementation": attention, **options})


model_utils.HFModel.__init__ = _with_attention
runpy.run_path(sys.argv[0], run_name="__main__")
