import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.data.order import epoch_order, index_at

counts, seeds, epochs = st.integers(0, 300), st.integers(0, 2**32), st.integers(0, 10_000)


@settings(deadline=None)
@given(counts, seeds, epochs)
def test_an_epoch_is_a_permutation(count, seed, epoch):
    order = epoch_order(count, seed, epoch)
    assert sorted(order) == list(range(count))
    assert np.array_equal(order, epoch_order.__wrapped__(count, seed, epoch))
    if count >= 50:
        assert not np.array_equal(order, epoch_order(count, seed, epoch + 1))
        assert not np.array_equal(order, epoch_order(count, seed + 1, epoch))


def test_the_order_of_a_seed_never_changes():
    """A run begun with one version of vidaccel is continued with another."""
    assert epoch_order(8, seed=1, epoch=2).tolist() == [6, 0, 7, 5, 1, 4, 3, 2]


def test_a_shared_order_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(8, 0, 0)[0] = 3


@settings(deadline=None)
@given(st.integers(1, 50), seeds)
def test_positions_walk_through_the_epochs(count, seed):
    walked = [index_at(position, count, seed) for position in range(3 * count)]
    assert walked == [index for epoch in range(3) for index in epoch_order(count, seed, epoch)]
