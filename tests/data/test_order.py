"""The order in which samples are drawn."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vidaccel.data.order import epoch_order, index_at


@given(length=st.integers(0, 300), seed=st.integers(0, 2**32), epoch=st.integers(0, 10_000))
def test_order_is_a_permutation_of_seed_and_epoch(length, seed, epoch):
    order = epoch_order(length, seed, epoch)
    assert sorted(order) == list(range(length))
    assert np.array_equal(order, epoch_order.__wrapped__(length, seed, epoch))
    if length >= 50:
        assert not np.array_equal(order, epoch_order(length, seed, epoch + 1))
        assert not np.array_equal(order, epoch_order(length, seed + 1, epoch))


def test_epochs_follow_one_another():
    walked = [index_at(position, 5, seed=3) for position in range(10)]
    assert walked == [*epoch_order(5, 3, 0), *epoch_order(5, 3, 1)]
