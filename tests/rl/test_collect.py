"""Which problems a step draws, and how resampling fills it."""

from gtpo_jax.rl import rollout
from gtpo_jax.rl.rollout import RolloutStats
from gtpo_jax.rl.types import Trajectory, Turn


def test_problems_are_walked_epoch_by_epoch():
    items = list(range(10))
    walked = rollout.take(items, 0, 25, seed=3)
    assert sorted(walked[:10]) == sorted(walked[10:20]) == items
    assert walked[:10] != walked[10:20]
    assert rollout.take(items, 7, 5, seed=3) == walked[7:12]


class Outcomes:
    """A sampler that answers problem p right in its first `right[p]` samples."""

    def __init__(self, right):
        self.right, self.asked = right, []

    def __call__(self, problems, samples, step):
        self.asked.append(list(problems))
        made = [
            Trajectory(p, m, [1], [Turn([2], [-1.0])], "finished", "1", m < self.right[p])
            for p in problems
            for m in range(samples)
        ]
        return made, RolloutStats(sampled=len(made))


def collected(right, rounds, problems=2):
    sample = Outcomes(right)
    walk = list(range(len(right)))
    return rollout.collect(sample, walk, 0, 0, 0, problems, 2, rounds), sample.asked


def test_resampling_fills_in_the_order_drawn():
    (_, _, consumed), asked = collected([1] * 8, rounds=3)
    assert consumed == 2 and len(asked) == 1
    order = rollout.take(list(range(8)), 0, 8, seed=0)
    # Only the second, fifth and sixth problem drawn have groups with both outcomes.
    right = [0] * 8
    for place in (1, 4, 5):
        right[order[place]] = 1
    (trajectories, stats, consumed), asked = collected(right, rounds=3)
    assert [t.problem for t in trajectories[::2]] == [order[1], order[4]]
    assert consumed == 6 and stats.sampled == 12
    # When rounds run out, groups without spread fill the step.
    (trajectories, _, _), _ = collected([0] * 8, rounds=1)
    assert [t.problem for t in trajectories[::2]] == order[:2]
    # Without resampling, nothing is drawn twice and nothing is left out.
    (trajectories, _, _), asked = collected([0] * 8, rounds=0)
    assert [t.problem for t in trajectories[::2]] == order[:2] and len(asked) == 1
