"""Reading ahead: order, bound, errors and early exits."""

import threading

import pytest

from flashfmt.convert.read_ahead import read_ahead


def test_items_arrive_in_order():
    with read_ahead(iter(range(1000)), lambda _: 1, 10) as items:
        assert list(items) == list(range(1000))


def test_the_waiting_items_are_bounded():
    consumed, lead = 0, []

    def produce():
        for i in range(200):
            lead.append(i - consumed)
            yield i

    with read_ahead(produce(), lambda _: 10, 50) as items:
        for _ in items:
            consumed += 1
    assert max(lead) <= 5 + 2  # 50 bytes wait; one more is being put, one more has been taken


def test_an_item_beyond_the_limit_waits_alone():
    with read_ahead(iter([100, 100, 1]), lambda nbytes: nbytes, 10) as items:
        assert list(items) == [100, 100, 1]


def test_errors_arrive_after_the_items_before_them():
    def produce():
        yield 1
        raise ZeroDivisionError

    with read_ahead(produce(), lambda _: 1, 10) as items:
        assert next(items) == 1
        with pytest.raises(ZeroDivisionError):
            next(items)


def test_leaving_early_stops_the_thread():
    before = threading.active_count()
    with read_ahead(iter(range(10**9)), lambda _: 1, 4) as items:
        assert next(items) == 0
    assert threading.active_count() == before
    with pytest.raises(KeyError), read_ahead(iter(range(10**9)), lambda _: 1, 4) as items:
        raise KeyError
    assert threading.active_count() == before
