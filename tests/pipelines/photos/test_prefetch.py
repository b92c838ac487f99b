"""Work ahead of time: in order, bounded, and beside the caller's own."""

import threading
import time

import pytest

from pipelines.photos.prefetch import prefetch


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_results_come_in_the_order_of_their_items(threads):
    def slow_at_first(n):
        time.sleep(0.01 * (3 - n % 4))
        return -n

    assert list(prefetch(slow_at_first, range(9), threads, 3)) == [-n for n in range(9)]
    assert list(prefetch(slow_at_first, [], threads, 3)) == []


@pytest.mark.parametrize(("threads", "ahead"), [(0, 3), (1, 3), (4, 3), (2, 0)])
def test_no_more_items_are_drawn_than_may_be_ahead(threads, ahead):
    drawn, taken = 0, 0

    def items():
        nonlocal drawn
        for n in range(20):
            drawn += 1
            assert drawn - taken <= ahead + 2
            yield n

    for _ in prefetch(lambda n: n, items(), threads, ahead):
        taken += 1
    assert drawn == taken == 20


def test_the_next_item_is_computed_while_the_caller_holds_the_last():
    """Each side waits for the other: without a thread of its own, the third item would never be begun."""
    begun = [threading.Event() for _ in range(5)]

    def mark(n):
        begun[n].set()
        return n

    for n in prefetch(mark, range(5), 1, 2):
        assert all(event.wait(10) for event in begun[n : n + 3])


@pytest.mark.parametrize("threads", [0, 2])
def test_error_is_raised_where_its_item_would_have_come(threads):
    def halve(n):
        if n == 3:
            raise ValueError("three")
        return n / 2

    results = prefetch(halve, range(9), threads, 4)
    assert [next(results) for _ in range(3)] == [0, 0.5, 1]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_threads_end_with_a_caller_that_stops_early():
    before = threading.active_count()
    results = prefetch(lambda n: n, range(100), 3, 5)
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before
