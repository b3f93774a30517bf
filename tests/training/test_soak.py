"""A short soak; tests/soak.py --kills N is the long one."""

import secrets

import pytest
from soak import Soak


@pytest.mark.slow
def test_killed_runs_end_as_if_nobody_had_killed_them(store_64, tmp_path):
    """Four kills -9 of two real ranks, two of them inside a save; the seed is printed where it fails."""
    soak = Soak(store_64, tmp_path, secrets.randbelow(2**32), print)
    soak.run(kills=4)
    assert soak.inside >= 2
