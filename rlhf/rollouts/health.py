"""Sampler health: which samplers may get work, and what to do about those that may not.

    dead --started--> stale --loaded(current)--> healthy --dispatched--> busy --replied--> healthy or stale

A new process holds no weights and would raise; one that missed a publish holds old weights and would answer without an error.
So only `healthy` gets work, and the one way there is an acknowledged load of the current version whose checksum,
taken over the bytes read back in the sampler, is the published one. Ray reports nothing for a stopped process, so each wait
(start, load, batch) has its own deadline; whoever misses one is condemned: killed, replaced under the next generation
number, and its tickets given back.

An event is a function of the state and gives the next state and commands; `now` is in seconds of any monotonic clock. An
event of an older generation, or out of turn, changes nothing. Left out: what a batch is, and how commands are carried out
(`actors.fleet`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


class StaleWeights(RuntimeError):
    """A sampler holds other bytes than were published: its samples would train the wrong policy."""


class SamplerLost(RuntimeError):
    """A sampler failed more often than samplers.max_restarts allows."""


class Stalled(RuntimeError):
    """There is work and a healthy sampler, yet nothing is in flight: a defect that would look like waiting."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Command: kill the sampler's process, if it has one (it may only seem dead), give the work of these tickets out
    again, and start a new process, whose events are reported under this generation."""

    sampler: int
    generation: int
    tickets: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Command: load this policy version and acknowledge it."""

    sampler: int
    generation: int
    version: int


@dataclass(frozen=True, kw_only=True)
class Sampler:
    generation: int = 0
    status: Literal["dead", "stale", "healthy", "busy"] = "dead"
    version: int | None = None
    """The policy version that it holds, as acknowledged; None: an empty process."""
    loading: int | None = None
    """The version being loaded (only while stale)."""
    checksum: str = ""
    """As published, of the version being loaded."""
    deadline: float | None = None
    """Of the start, load or batch being waited for; None: nothing is."""
    tickets: tuple[int, ...] = ()
    """The batch being sampled (only while busy)."""
    history: tuple[str, ...] = ()
    """Why each earlier generation ended."""


@dataclass(frozen=True, kw_only=True)
class HealthState:
    max_restarts: int
    """Of each sampler, over the run."""
    timeout_s: float
    """Of a start, a load and a batch."""
    samplers: Mapping[int, Sampler]
    version: int | None = None
    """The current policy version; None: nothing was published yet."""
    checksum: str = ""


Next = tuple[HealthState, tuple[Start | Load, ...]]


def start(count: int, *, max_restarts: int, timeout_s: float, now: float) -> Next:
    """`count` dead samplers, numbered from 0, and the commands that start them."""
    samplers = dict.fromkeys(range(count), Sampler(deadline=now + timeout_s))
    state = HealthState(max_restarts=max_restarts, timeout_s=timeout_s, samplers=samplers)
    return state, tuple(Start(sampler=index, generation=0) for index in range(count))


def healthy(state: HealthState) -> tuple[int, ...]:
    """The samplers that may get work now, ascending."""
    return tuple(index for index in sorted(state.samplers) if state.samplers[index].status == "healthy")


def started(state: HealthState, index: int, generation: int, now: float) -> Next:
    """The process is up, with nothing loaded."""
    return _serve_or_load(state, index, now) if _awaited(state, index, generation, "dead") else (state, ())


def died(state: HealthState, index: int, generation: int, reason: str, now: float) -> Next:
    """It is dead, or failed in a way that only a new process mends. Raises SamplerLost."""
    if generation != state.samplers[index].generation:
        return state, ()
    return _replace_process(state, index, reason, now)


def loaded(state: HealthState, index: int, generation: int, version: int, checksum: str, now: float) -> Next:
    """It holds `version`. checksum: of the bytes read back in the sampler, not an echo of the manifest.

    Raises StaleWeights where that is not the published one.
    """
    sampler = state.samplers[index]
    if not _awaited(state, index, generation, "stale") or version != sampler.loading:
        return state, ()
    if checksum != sampler.checksum:
        raise StaleWeights(
            f"sampler {index} holds checksum {checksum} for policy version {version}, not the published "
            f"{sampler.checksum}: its weights are not the trainer's"
        )
    return _serve_or_load(_with(state, index, replace(sampler, version=version)), index, now)


def dispatched(state: HealthState, index: int, tickets: tuple[int, ...], now: float) -> Next:
    """A healthy sampler was given a batch; ValueError for any other."""
    sampler = state.samplers[index]
    if sampler.status != "healthy":
        raise ValueError(f"sampler {index} is {sampler.status}: only a healthy one may get work")
    return _with(state, index, replace(sampler, status="busy", deadline=now + state.timeout_s, tickets=tickets)), ()


def replied(state: HealthState, index: int, generation: int, now: float) -> Next:
    """It answered its batch."""
    return _serve_or_load(state, index, now) if _awaited(state, index, generation, "busy") else (state, ())


def published(state: HealthState, version: int, checksum: str, now: float) -> Next:
    """A new policy version is there. ValueError unless it is above the last, also after a rollback of the trainer.

    Idle samplers load it at once; busy and loading ones when they are done, dead ones when they are back.
    """
    if state.version is not None and version <= state.version:
        raise ValueError(f"published version {version} is not above {state.version}: versions only grow")
    state = replace(state, version=version, checksum=checksum)
    commands: tuple[Start | Load, ...] = ()
    for index, sampler in sorted(state.samplers.items()):
        if sampler.status == "healthy" or (sampler.status == "stale" and sampler.loading is None):
            state, load = _serve_or_load(state, index, now)
            commands += load
    return state, commands


def ticked(state: HealthState, open_groups: int, judging: int, now: float) -> Next:
    """Time has passed and work was dispatched. Raises SamplerLost and Stalled.

    open_groups: those that still need candidates or scores; judging: candidates with the judges.
    """
    commands: tuple[Start | Load, ...] = ()
    for index, sampler in sorted(state.samplers.items()):
        if sampler.deadline is not None and now > sampler.deadline:
            waited = {"dead": "starting", "stale": f"loading version {sampler.loading}", "busy": "sampling a batch"}
            late = f"hung: no answer {now - sampler.deadline:.0f} s after its deadline, {waited[sampler.status]}"
            state, condemned = _replace_process(state, index, late, now)
            commands += condemned
    if commands:  # a batch may just have been given back: look for a stall when the shell has dispatched it
        return state, commands
    busy = any(sampler.status == "busy" for sampler in state.samplers.values())
    if open_groups and not judging and not busy and healthy(state):
        raise Stalled(
            f"{open_groups} groups are open and samplers {healthy(state)} are healthy, but no candidate is being "
            "sampled or judged: a reply was lost"
        )
    return state, commands


def _awaited(state: HealthState, index: int, generation: int, status: str) -> bool:
    """Whether an event is one of the process that there is now, and in turn."""
    sampler = state.samplers[index]
    return (sampler.generation, sampler.status) == (generation, status)


def _serve_or_load(state: HealthState, index: int, now: float) -> Next:
    """An idle process serves if it holds the current version, and loads it otherwise. The only way to `healthy`."""
    sampler = replace(state.samplers[index], status="stale", loading=None, deadline=None, tickets=())
    if state.version is None:
        return _with(state, index, sampler), ()
    if sampler.version == state.version:
        return _with(state, index, replace(sampler, status="healthy")), ()
    deadline = now + state.timeout_s
    sampler = replace(sampler, loading=state.version, checksum=state.checksum, deadline=deadline)
    load = Load(sampler=index, generation=sampler.generation, version=state.version)
    return _with(state, index, sampler), (load,)


def _replace_process(state: HealthState, index: int, reason: str, now: float) -> Next:
    """Condemn this generation and start the next."""
    old = state.samplers[index]
    history = (*old.history, f"generation {old.generation}: {reason}")
    if len(history) > state.max_restarts:
        raise SamplerLost(
            f"sampler {index} failed {len(history)} times, samplers.max_restarts = {state.max_restarts}:\n  "
            + "\n  ".join(history)
        )
    new = Sampler(generation=old.generation + 1, history=history, deadline=now + state.timeout_s)
    command = Start(sampler=index, generation=new.generation, tickets=old.tickets, reason=reason)
    return _with(state, index, new), (command,)


def _with(state: HealthState, index: int, sampler: Sampler) -> HealthState:
    return replace(state, samplers={**state.samplers, index: sampler})
