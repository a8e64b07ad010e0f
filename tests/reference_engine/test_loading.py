"""Jobs run side by side: results in order, the first failure in order, nothing left running."""

import threading
import time

import pytest

from reference_engine.loading import N_THREADS, run_side_by_side


def test_progress_comes_in_order_and_on_the_callers_thread():
    seen = []

    def job(i):
        time.sleep(0.002 * (7 - i % 8))
        return i

    run_side_by_side([lambda i=i: job(i) for i in range(16)], lambda n: seen.append((n, threading.current_thread())))
    assert seen == [(i, threading.current_thread()) for i in range(16)]


def test_jobs_run_at_the_same_time():
    together = threading.Barrier(N_THREADS, timeout=20)
    run_side_by_side([together.wait] * N_THREADS)


def test_the_first_failure_is_raised_and_what_has_not_begun_is_dropped():
    done = []

    def job(i):
        time.sleep(0.01)
        if i in {2, 3}:
            raise ValueError(i)
        done.append(i)
        return i

    with pytest.raises(ValueError, match="2"):
        run_side_by_side([lambda i=i: job(i) for i in range(200)])
    n_done = len(done)
    assert n_done < 100
    time.sleep(0.05)
    assert len(done) == n_done


def test_no_jobs_are_no_work():
    run_side_by_side([], lambda _: pytest.fail("nothing was loaded"))
