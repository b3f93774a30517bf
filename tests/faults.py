"""Faults for ranks of their own process to meet; ranks.start_ranks(fault="name") puts one in before train.py runs."""

import math
import os
import resource
import threading
import time
from collections.abc import Callable

import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from ropewalk.model.loss import LossModel


def _in_forward(happen: Callable[[int], bool], do: Callable[[object], object]) -> None:
    """Have rank 1's n-th forward (from 1) of the session, where ``happen(n)``, return ``do(loss)``."""
    real, calls = LossModel.forward, 0

    def forward(self, *arguments, **named):
        nonlocal calls
        calls += 1
        loss = real(self, *arguments, **named)
        return do(loss) if os.environ["RANK"] == "1" and happen(calls) else loss

    LossModel.forward = forward


def nan_in_forward_five() -> None:
    _in_forward(lambda n: n == 5, lambda loss: loss * math.nan)


def nan_always() -> None:
    _in_forward(lambda n: True, lambda loss: loss * math.nan)


def sleep_in_forward_forty() -> None:
    _sleep_in_forward(40, 4)


def sleep_in_forward_one() -> None:
    _sleep_in_forward(1, 7)


def _sleep_in_forward(number: int, seconds: float) -> None:
    def sleep(loss):
        time.sleep(seconds)
        return loss

    _in_forward(lambda n: n == number, sleep)


def files_of_20_kilobytes_on_rank_one() -> None:
    """A disk that is full, for one rank: whatever it writes ends there."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def step_eight_is_never_written() -> None:
    """A disk that takes ten minutes for a file of step 8 that is written beside the training."""
    real = torch.save

    def save(content, path, *arguments, **named):
        if "step-00000008" in str(path) and threading.current_thread() is not threading.main_thread():
            time.sleep(600)
        return real(content, path, *arguments, **named)

    torch.save = save


def every_rank_a_node() -> None:
    """Errors are told once a node."""
    os.environ["LOCAL_RANK"] = "0"


def rank_zero_prints_to_a_full_disk() -> None:
    if os.environ["RANK"] == "0":
        full = os.open("/dev/full", os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(full, stream)


def evaluations_fail_on_rank_one() -> None:
    """The grade of an answer after step 1, and after step 2 a layer in a pass."""
    from ropewalk.evaluation import TrainingEvaluation
    from ropewalk.evaluation.harness import needle_retrieval

    evaluate, grade, forward, steps = TrainingEvaluation.__call__, needle_retrieval.grade, LlamaMLP.forward, [0]
    is_here = os.environ["RANK"] == "1"

    def at(self, scorer, step):
        steps.append(step)
        return evaluate(self, scorer, step)

    def failing_grade(*arguments):
        return 1 / 0 if is_here and steps[-1] == 1 else grade(*arguments)

    def failing_forward(module, states):
        if is_here and steps[-1] == 2 and not module.training:
            raise torch.OutOfMemoryError("made by the test")
        return forward(module, states)

    TrainingEvaluation.__call__, needle_retrieval.grade, LlamaMLP.forward = at, failing_grade, failing_forward
