"""The computed table of docs/scale.md is what the study prints."""

from pathlib import Path

from studies.communication import exchanged, exchanges, shared_weights, table

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_a_device_sends_all_but_its_own_part_four_times_a_block():
    # 6 tokens of width 8 on each of two devices: half of 6 x 8 numbers of 2 bytes, four times.
    assert exchanged(12, 8, blocks=1, devices=2) == exchanged(11, 8, blocks=1, devices=2) == 4 * (6 * 8 * 2) // 2
    assert exchanged(12, 8, blocks=3, devices=1) == 0


def test_a_pass_of_a_training_shares_weights_three_times_and_gradients():
    assert shared_weights(teacher=80, student=100, trained=20, devices=4) == (80 + 100 + 100 + 20) * 3 / 4


def test_the_page_has_the_table_of_the_video_that_it_names():
    video, _ = exchanges()
    page = PAGE.read_text()
    assert f"{video:,} video tokens" in page
    assert table() in page
    assert table("wan_14b/cfg") in page
