"""vLLM as the engine of lm-eval's tasks: for generation at speed. Never run here: there was no GPU and no vLLM.

vLLM reads its spectrum from config.json, so it gets the checkpoint's weights beside a config compiled for the length.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.evaluation.scaled_copy import scaled_copy
from ropewalk.evaluation.settings import Setting

if TYPE_CHECKING:
    from ropewalk.evaluation.subject import Subject


def load_vllm(subject: Subject, setting: Setting, length: int) -> Any:
    """lm-eval's vLLM model under a setting's spectrum, every visible GPU holding a part of it.

    Raises:
        ValueError: where vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ValueError(
            "backend=vllm, but vllm is not installed; install it on the GPU machine, or use backend=transformers"
        )
    import torch
    from lm_eval.models.vllm_causallms import VLLM

    class CheckedVLLM(VLLM):
        """vLLM that refuses a prompt it would cut from the left."""

        def _model_generate(self, requests: Any = None, *arguments: Any, **options: Any) -> Any:
            longest = max(map(len, requests or [[]]))
            if longest > length:
                raise ValueError(
                    f"a prompt of {longest} tokens does not fit length {length}; evaluate at a greater one"
                )
            return super()._model_generate(requests, *arguments, **options)

    scratch = tempfile.TemporaryDirectory(prefix="ropewalk-vllm-")
    model = CheckedVLLM(
        pretrained=str(scaled_copy(subject.directory, Path(scratch.name), setting, length)),
        dtype=subject.config.dtype,
        tensor_parallel_size=torch.cuda.device_count(),
        max_model_len=length,
        seed=subject.config.seed,
    )
    model.scratch = scratch  # kept as long as the model
    return model
