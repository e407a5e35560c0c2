"""Lists of full steps that are run together: each as it would be alone, and nothing twice."""

from itertools import combinations

from vidaccel.train.predictor.lists import run_lists


def test_lists_are_run_as_alone_and_what_they_share_once():
    lists = [(0, *rest) for count in range(4) for rest in combinations(range(1, 4), count)]
    run = []

    def full(state, step):
        run.append(state + f"F{step}")
        return run[-1]

    def predicted(state, step):
        return state + f"p{step}"

    found = dict(run_lists([*lists, lists[0]], 4, "", full, predicted))
    assert found == {each: "".join(f"{'F' if i in each else 'p'}{i}" for i in range(4)) for each in lists}
    assert len(run) == len(set(run)) == len(lists)  # each full step after each of its pasts
