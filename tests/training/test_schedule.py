"""The learning rate at the points that its definition fixes."""

import pytest

from ropewalk.config.train import TrainerConfig
from ropewalk.training.schedule import learning_rate

TRAINER = TrainerConfig(max_steps=101, global_batch_size=1, learning_rate=1e-5, warmup_ratio=0.0)
WARM = TrainerConfig(max_steps=100, global_batch_size=1, learning_rate=1e-5, warmup_ratio=0.1)


def test_warm_up_is_linear_and_reaches_the_peak():
    assert [learning_rate(step, WARM) for step in (0, 4, 9)] == pytest.approx([1e-6, 5e-6, 1e-5])
    assert learning_rate(10, WARM) == pytest.approx(1e-5)


def test_cosine_is_half_way_down_in_the_middle_and_at_the_floor_at_the_end():
    assert learning_rate(0, TRAINER) == pytest.approx(1e-5)
    assert learning_rate(50, TRAINER) == pytest.approx(5.5e-6)  # the mean of peak and floor
    assert learning_rate(100, TRAINER) == pytest.approx(1e-6)
    assert learning_rate(25, TRAINER) == pytest.approx(1e-6 + 9e-6 * (1 + 2**-0.5) / 2)


def test_one_step_run():
    assert learning_rate(0, TrainerConfig(max_steps=1, learning_rate=1.0, global_batch_size=1)) == 1.0
