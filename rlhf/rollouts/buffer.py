"""The pair buffer: the closed groups of a `RolloutState`, and how a full batch of pairs leaves it.

The buffer is no second store: closed groups stay in the one rollout state, so that a prompt can never be in two
places. Consumption is by cursor, not by arrival: with lookahead 0 exactly one batch of groups is in flight or closed,
nothing is taken until all of them are there, and so the batch, the reward scale and the margins are functions of the
prompt stream alone. Left out: partial batches (every rank must get the same count), re-use of pairs, priorities.
"""

from collections.abc import Mapping
from dataclasses import replace

from rlhf.rollouts.pairing import RewardScale, RolloutGroup, make_pair
from rlhf.rollouts.rollout import NothingPasses, drop
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

    `step` is the number of optimizer updates done. The age of a pair is `step` minus the step at which its policy
    version was published, from `version_steps`; it is checked here, when the pair is used. Dropped as "stale": an age
    above `max_age`, below 0, or of a version that `version_steps` does not know (delete the versions that a rollback
    undid).

    With fewer than `count` closed groups the state comes back unchanged. Otherwise groups that turn out stale or tied
    are dropped, so that `wanted` asks for others. Only consumed groups enter the reward scale, in cursor order.
    Raises NothingPasses where groups turn stale again and again and nothing is ever taken.
    """
    while len(state.closed) >= count:
        groups = [state.closed[cursor] for cursor in sorted(state.closed)[:count]]
        scale = state.scale.observe(groups)
        pairs = [make_pair(group, scale.totals(group)) for group in groups]
        ages = [None if pair is None else _age(pair, step, version_steps) for pair in pairs]
        bad = {
            group.cursor: _unusable(pair, age, max_age)
            for group, pair, age in zip(groups, pairs, ages, strict=True)
            if pair is None or age is None or not 0 <= age <= max_age
        }
        if not bad:
            return _consume(state, scale, tuple(filter(None, pairs)), tuple(a for a in ages if a is not None))
        state = replace(state, closed={c: group for c, group in state.closed.items() if c not in bad})
        for cursor, (reason, words) in bad.items():
            state = drop(state, cursor, reason, words)
        # A whole buffer may rightly be stale after a rollback: lookahead + 1 batches, and max_age >= lookahead.
        limit = state.limits.max_dropped_in_a_row + (max_age + 2) * count
        if state.stale_in_a_row > limit:
            raise NothingPasses(
                f"{state.stale_in_a_row} groups in a row were too old to train on when their turn came; check that "
                f"the policy is published, or raise rollout.max_age = {max_age}. The last: {words}"
            )
    return state, None


def _age(pair: Pair, step: int, version_steps: Mapping[int, int]) -> int | None:
    published = version_steps.get(pair.version)
    return None if published is None else step - published


def _unusable(pair: Pair | None, age: int | None, max_age: int) -> tuple[str, str]:
    if pair is None:
        return "tie", "tie: the scaled rewards of its candidates are equal"
    if age is None or age < 0:
        return "stale", f"stale: policy version {pair.version} is not one of this run's history"
    return "stale", f"stale: sampled {age} steps ago, rollout.max_age = {max_age}"


def _consume(
    state: RolloutState, scale: RewardScale, pairs: tuple[Pair, ...], ages: tuple[int, ...]
) -> tuple[RolloutState, tuple[Pair, ...]]:
    used = {pair.cursor for pair in pairs}
    window = replace(
        state.window,
        ages=state.window.ages + ages,
        margins=state.window.margins + tuple(pair.margin for pair in pairs),
    )
    closed: dict[int, RolloutGroup] = {c: group for c, group in state.closed.items() if c not in used}
    state = replace(
        state, closed=closed, scale=scale, trained=state.trained + len(pairs), stale_in_a_row=0, window=window
    )
    return state, pairs
