"""vLLM as the engine of lm-eval's tasks: for generation at speed. Run on a CPU alone (docs/status.md).

vLLM reads its spectrum from config.json, so it gets the checkpoint's weights beside a config compiled for the length.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ropewalk.errors import UserError
from ropewalk.evaluation.evaluated_checkpoint import EvaluatedCheckpoint, scaled_copy
from ropewalk.evaluation.settings import Setting


def load_vllm(checkpoint: EvaluatedCheckpoint, setting: Setting, length: int, overflow: str) -> Any:
    """lm-eval's vLLM model under a setting's spectrum, every visible GPU holding a part of it.

    Raises:
        UserError: vLLM is not installed, or prompts are to be cut in the middle, which it does not do.
    """
    if overflow != "error":
        raise UserError(f"backend=vllm cuts no prompts, and suite.overflow={overflow}; use backend=transformers")
    if find_spec("vllm") is None:
        raise UserError(
            "backend=vllm, but vllm is not installed; install it on the GPU machine, or use backend=transformers"
        )
    import torch
    from lm_eval.models.vllm_causallms import VLLM

    class CheckedVLLM(VLLM):
        """vLLM that refuses prompts that lm-eval's own class would cut from the left."""

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            for request in requests:
                text, options = request.args
                check_room(len(self.tok_encode(text)) + int(options.get("max_gen_toks", self.max_gen_toks)))
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False) -> Any:
            for _, context, continuation in requests:
                check_room(len(context) + len(continuation))
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm)

    def check_room(tokens: int) -> None:
        if tokens > length:
            raise UserError(
                f"a prompt takes {tokens} tokens with its answer, length {length} is less; use a greater one"
            )

    scratch = tempfile.TemporaryDirectory(prefix="ropewalk-vllm-")
    model = CheckedVLLM(
        pretrained=str(scaled_copy(checkpoint.directory, Path(scratch.name), setting, length)),
        dtype=checkpoint.config.dtype,
        tensor_parallel_size=max(1, torch.cuda.device_count()),
        max_model_len=length,
        seed=checkpoint.config.seed,
    )
    model.scratch = scratch  # kept as long as the model
    return model
