import time

import pytest

from ropewalk.data.pool import in_processes


def work(directory, number):
    """The first finds no disk; the others say that they have begun."""
    if number == 0:
        raise OSError("no space left on device")
    (directory / str(number)).touch()
    time.sleep(0.2)  # so that the fault is met before one process has done them all


@pytest.mark.parametrize("cut", ["fault", "caller"])
def test_what_has_not_begun_is_left(tmp_path, cut):
    """Where a work fails with anything, and where the caller stops: three works are begun ahead at most."""
    first = 0 if cut == "fault" else 1
    results = in_processes(work, [(tmp_path, number) for number in range(first, first + 30)], 2)
    if cut == "fault":
        with pytest.raises(OSError, match="no space left on device"):
            list(results)
    else:
        next(results)
        results.close()
    assert len(list(tmp_path.iterdir())) < 20
