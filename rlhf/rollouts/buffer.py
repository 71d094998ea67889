"""The pair buffer: the closed groups of a `RolloutState`, and how a full batch of pairs leaves it.

Closed groups stay in the one rollout state, so that a prompt can never be in two places. Consumption is by cursor, not by
arrival: with lookahead 0 exactly one batch of groups is in flight or closed, nothing is taken until all of them are there,
and so the batch, the reward scale and the margins are functions of the prompt stream alone. Left out: partial batches
(every rank must get the same count), re-use of pairs, priorities.
"""

from collections.abc import Mapping
from dataclasses import replace

from rlhf.rollouts.pairing import make_pair
from rlhf.rollouts.rollout import NothingPasses, drop, observe
from rlhf.rollouts.state import RolloutState
from rlhf.types import Pair


def wanted(state: RolloutState, count: int, lookahead: int) -> tuple[int, ...]:
    """The cursors to enqueue now, ascending: as many as keep (lookahead + 1)·count groups in flight or closed.

    Prompts that a resume reopened come first. `count` is pairs per step.
    """
    room = (lookahead + 1) * count - len(state.open) - len(state.closed)
    reopened = state.queued[: max(room, 0)]
    return (*reopened, *range(state.next_cursor, state.next_cursor + max(room - len(reopened), 0)))


def take(
    state: RolloutState, count: int, *, step: int, max_age: int, version_steps: Mapping[int, int]
) -> tuple[RolloutState, tuple[Pair, ...] | None]:
    """The `count` lowest-cursor groups that make a pair, as pairs in cursor order; None while there are fewer.

    `step` is the number of optimizer updates done. The age of a pair is `step` minus the step at which its policy version was
    published, from `version_steps`; it is checked here, when the pair is used. Dropped as "stale": an age above `max_age`,
    below 0, or of a version that `version_steps` does not know (delete those that a rollback undid).

    With fewer than `count` closed groups the state comes back unchanged. Otherwise groups that turn out stale or tied are
    dropped, so that `wanted` asks for others. Only consumed groups enter the reward scale, in cursor order. Raises
    NothingPasses where groups turn stale again and again and nothing is ever taken.
    """
    while len(state.closed) >= count:
        groups = [state.closed[cursor] for cursor in sorted(state.closed)[:count]]
        scale = state.scale.observe(groups)
        pairs = [make_pair(group, scale.parts(group)) for group in groups]
        faults = {
            group.cursor: fault
            for group, pair in zip(groups, pairs, strict=True)
            if (fault := _fault(pair, step, max_age, version_steps))
        }
        gone = set(faults) or {group.cursor for group in groups}
        state = replace(state, closed={cursor: group for cursor, group in state.closed.items() if cursor not in gone})
        if not faults:
            taken = tuple(pair for pair in pairs if pair)
            state = replace(state, scale=scale, trained=state.trained + count, stale_in_a_row=0)
            state = observe(state, "reward/margin", *(pair.margin for pair in taken))
            return observe(state, "rollout/staleness", *(step - version_steps[pair.version] for pair in taken)), taken
        for cursor, (reason, words) in faults.items():
            state = drop(state, cursor, reason, words)
        stale = [words for reason, words in faults.values() if reason == "stale"]
        # A whole buffer may rightly be stale after a rollback: lookahead + 1 batches, and max_age >= lookahead.
        limit = state.config.max_dropped_in_a_row + (max_age + 2) * count
        if state.stale_in_a_row > limit:
            raise NothingPasses(
                f"{state.stale_in_a_row} groups in a row were too old to train on when their turn came; check that "
                f"the policy is published, or raise rollout.max_age = {max_age}. The last: {stale[-1]}"
            )
    return state, None


def _fault(pair: Pair | None, step: int, max_age: int, version_steps: Mapping[int, int]) -> tuple[str, str] | None:
    """Why a group is dropped in place of being used, as the reason that is counted and in words."""
    if pair is None:
        return "tie", "tie: the scaled rewards of its candidates are equal"
    published = version_steps.get(pair.version)
    if published is None or published > step:
        return "stale", f"stale: policy version {pair.version} is not one of this run's history"
    if step - published > max_age:
        return "stale", f"stale: sampled {step - published} steps ago, rollout.max_age = {max_age}"
    return None
