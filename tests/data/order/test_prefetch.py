"""Loading ahead: in order, bounded, errors where they belong, and no thread left behind."""

import subprocess
import sys
import threading

import pytest

from ropewalk.data.order.batches import prefetched


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [1, 2, 7, 100])
def test_results_come_in_order_and_the_thread_goes(depth):
    assert list(prefetched(lambda n: n * n, range(20), depth)) == [n * n for n in range(20)]
    assert threads() == []
    assert list(prefetched(str, [], depth)) == []


def test_the_next_is_loaded_while_one_is_used():
    """No clock: the load of 1 and 2 must have happened before the consumer of 0 goes on."""
    loaded = {n: threading.Event() for n in range(10)}
    results = prefetched(lambda n: loaded[n].set(), range(10), depth=2)
    next(results)
    assert loaded[1].wait(10)
    assert loaded[2].wait(10)
    assert not loaded[3].wait(0.05)  # no further than depth
    next(results)
    assert loaded[3].wait(10)
    results.close()
    assert threads() == []


def test_loading_is_in_another_thread():
    names = list(prefetched(lambda _: threading.current_thread().name, range(3)))
    assert set(names) == {"prefetch_0"}


def test_an_error_comes_where_its_result_would_have():
    def load(number):
        if number == 3:
            raise OSError("disk gone")
        return number

    taken = []
    with pytest.raises(OSError, match="disk gone"):
        taken.extend(prefetched(load, range(10)))
    assert taken == [0, 1, 2]
    assert threads() == []


def test_dropping_the_iterator_ends_the_thread():
    for _ in prefetched(abs, range(10**9)):
        break
    assert threads() == []


def test_a_depth_of_none_is_refused_at_once():
    with pytest.raises(ValueError, match="depth=0 must be 1 or more"):
        prefetched(abs, [1], depth=0)


@pytest.mark.parametrize(("ending", "code"), [("", 0), ("raise SystemExit(3)", 3), ("raise KeyboardInterrupt", -2)])
def test_the_process_ends_quietly_in_the_middle(ending, code):
    script = (
        "import time\nfrom ropewalk.data.order.batches import prefetched\n"
        "results = prefetched(lambda n: time.sleep(0.01) or n, range(10**9))\n"
        f"next(results)\n{ending}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code
    assert "Thread" not in done.stderr
    assert "prefetch" not in done.stderr.replace("ropewalk.data.order.batches", "")
    if code != -2:
        assert done.stderr == ""
