import pytest

from vidaccel.errors import UserError, nearest


def test_a_user_error_is_one_line_and_one_hint():
    error = UserError("steps=0 is not possible", "steps must be at least 1")
    assert str(error) == "steps=0 is not possible\nhint: steps must be at least 1"
    assert (error.message, error.hint) == ("steps=0 is not possible", "steps must be at least 1")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("stepps", 'did you mean "steps"?'),
        ("Seed", 'did you mean "seed"?'),
        ("steps", 'did you mean "steps"?'),
        ("zzz", "choose from: guidance, seed, steps"),
        ("", "choose from: guidance, seed, steps"),
    ],
)
def test_nearest(word, hint):
    assert nearest(word, ["steps", "seed", "guidance"]) == hint
    assert nearest(word, []) == "leave it out: there are none to choose from"
    assert nearest(word, {"steps": 1, "seed": 2, "guidance": 3}) == hint
