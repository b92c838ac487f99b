"""Masks and vectors come back from their columns; questions to columns."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipelines import tables

FINITE_HALVES = st.builds(
    lambda bits, sign: sign * float(np.uint16(bits).view(np.float16)), st.integers(0, 0x7BFF), st.sampled_from([1, -1])
)


@given(arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40)))
@settings(deadline=None)
def test_masks_come_back_from_their_run_lengths(mask):
    back = tables.decode_mask(tables.encode_mask(mask), *mask.shape)
    assert back.dtype == bool and np.array_equal(back, mask)


@given(arrays.arrays(np.float16, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=FINITE_HALVES))
@settings(deadline=None)
def test_halves_come_back_from_a_column(matrix):
    column = pa.chunked_array([tables.halves(matrix[:2]), tables.halves(matrix[2:])])
    assert np.array_equal(tables.stack_halves(column), matrix)


def test_count_by_puts_the_most_frequent_first_and_ties_by_name():
    assert list(tables.count_by(["b", "c", "a", "b"]).items()) == [("b", 2), ("a", 1), ("c", 1)]
