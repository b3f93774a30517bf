"""What backend=vllm refuses before vLLM is loaded; generation by it is not tested here."""

from importlib.util import find_spec

import pytest

from ropewalk.evaluation.harness.lm_eval_suite import load_vllm


def test_prompts_that_would_be_cut_are_refused():
    with pytest.raises(ValueError, match=r"cuts no prompts, and suite\.overflow=middle; use backend=transformers"):
        load_vllm(None, None, 512, "middle")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed here")
def test_a_missing_vllm_is_named():
    with pytest.raises(ValueError, match="vllm is not installed; install it"):
        load_vllm(None, None, 512, "error")
