"""Sampler health: which samplers may get work, and what to do about those that may not.

    dead --Started--> stale --LoadAcked(current)--> healthy --Dispatched--> busy --Replied--> healthy or stale

A sampler that comes back from the dead is EMPTY, and one that missed a publish holds old weights; both would answer
without an error. So only `healthy` gets work, and the one way there is an acknowledged load of the current version
whose checksum, taken over the bytes read back in the sampler, is the published one. Ray reports nothing for a stopped
process, so each wait (start, load, batch) has its own deadline; whoever misses one is condemned: killed, replaced under
the next generation number, and its tickets given back. An event of an older generation changes nothing.

Pure: `advance(state, event, now) -> (state, commands)`, `now` in seconds of any monotonic clock. No Ray in here.
Left out: what a batch is, and how commands are carried out (`samplers.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Status = Literal["dead", "stale", "healthy", "busy"]


class StaleWeights(RuntimeError):
    """A sampler holds other bytes than were published: its samples would train the wrong policy."""


class SamplerLost(RuntimeError):
    """A sampler failed more often than samplers.max_restarts allows."""


class Stalled(RuntimeError):
    """There is work and a healthy sampler, yet nothing is in flight: a defect that would look like waiting."""


@dataclass(frozen=True, kw_only=True)
class HealthLimits:
    max_restarts: int
    """Of each sampler, over the run."""
    start_timeout_s: float
    load_timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Started:
    """The process is up, with nothing loaded."""

    sampler: int
    generation: int


@dataclass(frozen=True, kw_only=True)
class Died:
    """It is dead, or failed in a way that only a new process mends."""

    sampler: int
    generation: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class LoadAcked:
    sampler: int
    generation: int
    version: int
    checksum: str
    """Of the bytes read back in the sampler, not an echo of the manifest."""


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """The shell gave a healthy sampler a batch."""

    sampler: int
    deadline: float
    """On the clock of `now`."""
    tickets: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Replied:
    """It answered its batch."""

    sampler: int
    generation: int


@dataclass(frozen=True, kw_only=True)
class Published:
    """A new policy version is there to load. Versions only grow, also after a rollback of the trainer."""

    version: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time has passed. Send it after work was dispatched, with what the rollout machine says."""

    open_groups: int
    """Groups that still need candidates or scores."""
    judging: int
    """Candidates with the judges."""


Event = Started | Died | LoadAcked | Dispatched | Replied | Published | Tick


@dataclass(frozen=True, kw_only=True)
class Start:
    """Command: start this sampler as a new process and report its events under this generation."""

    sampler: int
    generation: int


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Command: kill the process of this generation; whatever it still answers is ignored."""

    sampler: int
    generation: int


@dataclass(frozen=True, kw_only=True)
class Load:
    """Command: load this policy version and acknowledge it."""

    sampler: int
    generation: int
    version: int


@dataclass(frozen=True, kw_only=True)
class Reissue:
    """Command: tell the rollout machine `SampleLost` for each of these tickets."""

    tickets: tuple[int, ...]
    reason: str


Command = Start | Kill | Load | Reissue


@dataclass(frozen=True, kw_only=True)
class Sampler:
    generation: int = 0
    status: Status = "dead"
    version: int | None = None
    """The policy version that it holds, as acknowledged; None: an empty process."""
    loading: int | None = None
    """The version being loaded (only while stale)."""
    deadline: float | None = None
    """Of the start, load or batch being waited for; None: nothing is."""
    tickets: tuple[int, ...] = ()
    """The batch being sampled (only while busy)."""
    history: tuple[str, ...] = ()
    """Why each earlier generation ended."""


@dataclass(frozen=True, kw_only=True)
class HealthState:
    limits: HealthLimits
    samplers: Mapping[int, Sampler]
    version: int | None = None
    """The current policy version; None: nothing was published yet."""
    checksums: Mapping[int, str] = field(default_factory=dict)
    """Of the current version, and of older ones still being loaded."""


def start(count: int, limits: HealthLimits, now: float) -> tuple[HealthState, tuple[Command, ...]]:
    """`count` dead samplers, numbered from 0, and the commands that start them."""
    sampler = Sampler(deadline=now + limits.start_timeout_s)
    state = HealthState(limits=limits, samplers=dict.fromkeys(range(count), sampler))
    return state, tuple(Start(sampler=index, generation=0) for index in range(count))


def healthy(state: HealthState) -> tuple[int, ...]:
    """The samplers that may get work now, ascending."""
    return tuple(index for index in sorted(state.samplers) if state.samplers[index].status == "healthy")


def advance(state: HealthState, event: Event, now: float) -> tuple[HealthState, tuple[Command, ...]]:
    """The next state and what to do about it.

    Raises StaleWeights, SamplerLost and Stalled (stop the run and show the message), and ValueError for an event that a
    correct shell never sends: a batch for a sampler that is not healthy, a version that does not grow.
    """
    match event:
        case Published():
            return _published(state, event, now)
        case Tick():
            return _tick(state, event, now)
        case Dispatched():
            return _dispatched(state, event)
    sampler = state.samplers[event.sampler]
    if event.generation != sampler.generation:
        return state, ()
    match event:
        case Died():
            return _replace_process(state, event.sampler, event.reason, now)
        case Started() if sampler.status == "dead":
            return _serve_or_load(state, event.sampler, now)
        case LoadAcked() if sampler.status == "stale" and event.version == sampler.loading:
            return _acked(state, event, now)
        case Replied() if sampler.status == "busy":
            return _serve_or_load(state, event.sampler, now)
    return state, ()


def _serve_or_load(state: HealthState, index: int, now: float) -> tuple[HealthState, tuple[Command, ...]]:
    """An idle process serves if it holds the current version, and loads it otherwise. The only way to `healthy`."""
    sampler = replace(state.samplers[index], status="stale", loading=None, deadline=None, tickets=())
    if state.version is None:
        return _with(state, index, sampler), ()
    if sampler.version == state.version:
        return _with(state, index, replace(sampler, status="healthy")), ()
    sampler = replace(sampler, loading=state.version, deadline=now + state.limits.load_timeout_s)
    load = Load(sampler=index, generation=sampler.generation, version=state.version)
    return _with(state, index, sampler), (load,)


def _acked(state: HealthState, event: LoadAcked, now: float) -> tuple[HealthState, tuple[Command, ...]]:
    published = state.checksums[event.version]
    if event.checksum != published:
        raise StaleWeights(
            f"sampler {event.sampler} holds checksum {event.checksum} for policy version {event.version}, not the "
            f"published {published}: its weights are not the trainer's"
        )
    sampler = replace(state.samplers[event.sampler], version=event.version)
    return _serve_or_load(_with(state, event.sampler, sampler), event.sampler, now)


def _published(state: HealthState, event: Published, now: float) -> tuple[HealthState, tuple[Command, ...]]:
    """Idle samplers load at once; busy and loading ones when they are done, dead ones when they are back."""
    if state.version is not None and event.version <= state.version:
        raise ValueError(f"published version {event.version} is not above {state.version}: versions only grow")
    loading = {sampler.loading for sampler in state.samplers.values()}
    checksums = {version: checksum for version, checksum in state.checksums.items() if version in loading}
    state = replace(state, version=event.version, checksums={**checksums, event.version: event.checksum})
    commands: tuple[Command, ...] = ()
    for index, sampler in sorted(state.samplers.items()):
        if sampler.status == "healthy" or (sampler.status == "stale" and sampler.loading is None):
            state, load = _serve_or_load(state, index, now)
            commands += load
    return state, commands


def _dispatched(state: HealthState, event: Dispatched) -> tuple[HealthState, tuple[Command, ...]]:
    sampler = state.samplers[event.sampler]
    if sampler.status != "healthy":
        raise ValueError(f"sampler {event.sampler} is {sampler.status}: only a healthy one may get work")
    sampler = replace(sampler, status="busy", deadline=event.deadline, tickets=event.tickets)
    return _with(state, event.sampler, sampler), ()


def _tick(state: HealthState, event: Tick, now: float) -> tuple[HealthState, tuple[Command, ...]]:
    commands: tuple[Command, ...] = ()
    for index, sampler in sorted(state.samplers.items()):
        if sampler.deadline is not None and now > sampler.deadline:
            waited = {"dead": "starting", "stale": f"loading version {sampler.loading}", "busy": "sampling a batch"}
            late = f"hung: no answer {now - sampler.deadline:.0f} s after its deadline, {waited[sampler.status]}"
            state, condemned = _replace_process(state, index, late, now)
            commands += condemned
    if commands:  # a batch may just have been given back: look for a stall when the shell has dispatched it
        return state, commands
    busy = any(sampler.status == "busy" for sampler in state.samplers.values())
    if event.open_groups and not event.judging and not busy and healthy(state):
        raise Stalled(
            f"{event.open_groups} groups are open and samplers {healthy(state)} are healthy, but no candidate is being "
            "sampled or judged: a reply was lost"
        )
    return state, commands


def _replace_process(
    state: HealthState, index: int, reason: str, now: float
) -> tuple[HealthState, tuple[Command, ...]]:
    """Condemn this generation: kill it (it may only seem dead), give its tickets back, start the next."""
    old = state.samplers[index]
    history = (*old.history, f"generation {old.generation}: {reason}")
    if len(history) > state.limits.max_restarts:
        raise SamplerLost(
            f"sampler {index} failed {len(history)} times, samplers.max_restarts = {state.limits.max_restarts}:\n  "
            + "\n  ".join(history)
        )
    new = Sampler(generation=old.generation + 1, history=history, deadline=now + state.limits.start_timeout_s)
    commands: tuple[Command, ...] = (Kill(sampler=index, generation=old.generation),)
    if old.tickets:
        commands += (Reissue(tickets=old.tickets, reason=reason),)
    return _with(state, index, new), (*commands, Start(sampler=index, generation=new.generation))


def _with(state: HealthState, index: int, sampler: Sampler) -> HealthState:
    return replace(state, samplers={**state.samplers, index: sampler})
