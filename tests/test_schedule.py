"""The learning rate of each step, against closed forms."""

import pytest

from ropewalk.config.schedule import describe_schedule, learning_rate
from ropewalk.config.train import TrainerConfig

PEAK = 1e-5


def trainer(max_steps=101, warmup_ratio=0.0, **more):
    return TrainerConfig(
        max_steps=max_steps, global_batch_size=1, learning_rate=PEAK, warmup_ratio=warmup_ratio, **more
    )


def rates(steps, config):
    return [learning_rate(step, config) for step in steps]


def test_warm_up_is_linear_and_reaches_the_peak():
    warm = trainer(100, 0.1)
    assert rates((0, 4, 9), warm) == pytest.approx([1e-6, 5e-6, 1e-5])
    assert learning_rate(10, warm) == pytest.approx(PEAK)


def test_a_share_of_the_steps_is_as_its_decimals_say():
    """0.07 * 100 is 7.000000000000001 in floats, and 8 when rounded up."""
    assert rates((6, 7), trainer(100, 0.07)) == [PEAK, PEAK]
    assert learning_rate(5, trainer(100, 0.07)) == pytest.approx(PEAK * 6 / 7)
    assert describe_schedule(trainer(100, 0.0, decay_ratio=0.07)).startswith("93 at 1e-05, 7 of cosine decay")


def test_cosine_is_half_way_down_in_the_middle_and_at_the_floor_at_the_end():
    assert rates((0, 50, 100), trainer()) == pytest.approx([PEAK, 5.5e-6, 1e-6])  # the mean of peak and floor
    assert learning_rate(25, trainer()) == pytest.approx(1e-6 + 9e-6 * (1 + 2**-0.5) / 2)


def test_linear_falls_by_the_same_amount_to_the_floor_or_to_zero():
    to_zero = trainer(schedule="linear", min_lr_ratio=0.0)
    assert rates(range(101), to_zero) == pytest.approx([PEAK * (1 - step / 100) for step in range(101)])
    assert learning_rate(100, to_zero) == 0.0
    to_a_tenth = trainer(schedule="linear")
    assert rates((0, 50, 100), to_a_tenth) == pytest.approx([PEAK, 5.5e-6, 1e-6])
    warm = trainer(111, 10 / 111, schedule="linear", min_lr_ratio=0.0)
    assert rates(range(10, 111), warm) == pytest.approx(rates(range(101), to_zero))


def test_a_plateau_lies_between_warm_up_and_decay():
    """100 steps: 10 of warm-up, 69 at the peak, then 21 of decay, of which the first is at the peak, too."""
    stable = trainer(100, 0.1, schedule="linear", min_lr_ratio=0.0, decay_ratio=0.21)
    assert rates(range(10, 80), stable) == [PEAK] * 70
    assert rates(range(79, 100), stable) == pytest.approx([PEAK * (1 - k / 20) for k in range(21)])
    assert rates(range(10), stable) == pytest.approx([PEAK * (k + 1) / 10 for k in range(10)])


def test_no_decay_at_all_and_no_room_for_one():
    assert rates(range(10, 100), trainer(100, 0.1, decay_ratio=0.0)) == [PEAK] * 90
    crowded = trainer(10, 0.5, schedule="linear", min_lr_ratio=0.0, decay_ratio=0.9)
    assert rates(range(5), crowded) == pytest.approx([2e-6, 4e-6, 6e-6, 8e-6, 1e-5])
    assert rates(range(5, 10), crowded) == pytest.approx([1e-5, 7.5e-6, 5e-6, 2.5e-6, 0])
    assert learning_rate(0, trainer(1)) == PEAK


def test_a_branch_decays_as_the_end_of_the_whole_does():
    """Of any length at all: the decay is a function of the steps since it began."""
    whole = trainer(40, 0.1, decay_ratio=0.25)
    assert rates(range(10), trainer(10)) == rates(range(30, 40), whole)


def test_phases_in_words():
    assert describe_schedule(trainer(100, 0.1)) == "10 of warm-up to 1e-05, 90 of cosine decay to 1e-06"
    stable = trainer(100, 0.0, schedule="linear", min_lr_ratio=0.0, decay_ratio=0.2)
    assert describe_schedule(stable) == "80 at 1e-05, 20 of linear decay to 0"
