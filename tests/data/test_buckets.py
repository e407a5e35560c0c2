"""Which size a clip is brought to, and batches of one size."""

import pytest

from vidaccel.data.buckets import Buckets, nearest

LANDSCAPE, PORTRAIT, SHORT, SMALL = (81, 480, 832), (81, 832, 480), (49, 480, 832), (81, 240, 416)


@pytest.mark.parametrize(
    ("shape", "height", "expected"),
    [
        (16 / 9, 1080, LANDSCAPE),  # the longer of two of one shape, and the nearer in height
        (9 / 16, 1920, PORTRAIT),
        (16 / 9, 240, SMALL),
        (1.01, 500, LANDSCAPE),
        (0.99, 500, PORTRAIT),
    ],
)
def test_the_nearest_in_shape_then_the_longest_then_the_nearest_in_height(shape, height, expected):
    assert nearest([SHORT, SMALL, PORTRAIT, LANDSCAPE], shape, height) == expected


def test_an_epoch_has_every_sample_in_batches_of_one_size():
    sizes = ["a"] * 5 + ["b"] * 4 + ["c"] + ["a"] * 2
    buckets = Buckets(sizes)
    assert buckets.commonest.tolist() == [0, 1, 2, 3, 4, 10, 11]
    epochs = [[buckets.batch(epoch * 7 + i, 2, seed=3) for i in range(7)] for epoch in range(4)]
    for epoch in epochs:
        assert {index for batch in epoch for index in batch} == set(range(12))
        assert all(len(batch) == 2 and len({sizes[index] for index in batch}) == 1 for batch in epoch)
        assert [9, 9] in epoch  # which is alone
    assert len({str(epoch) for epoch in epochs}) == 4
    assert len({str([sizes[batch[0]] for batch in epoch]) for epoch in epochs}) > 1  # sizes in no fixed order
    again = Buckets(sizes)
    assert [again.batch(index, 2, seed=3) for index in (20, 0, 7, 10**9)] == [
        epochs[2][6], epochs[0][0], epochs[1][0], buckets.batch(10**9, 2, seed=3)
    ]  # fmt: skip
    assert buckets.batch(0, 2, seed=4) != epochs[0][0] or buckets.batch(1, 2, seed=4) != epochs[0][1]
