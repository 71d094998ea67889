"""Rollouts: the shell around two state machines, the prompts' (`rlhf.rollouts.rollout`) and the samplers' (`health`).

It carries out what they decide (start, load, sample, judge) and tells them what happened. Everything it waits for is an
object reference with a handler, in one table; every wait is bounded. It holds references, scores and counters only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.asking import Failure
from actors.judges import JudgeCalls, PixelsLost
from actors.publication import Publication
from actors.sampler import Sampler, SampleRequest
from rlhf.data.audit import candidate_seed
from rlhf.data.prompts import PromptStream
from rlhf.rollouts import buffer, health, rollout
from rlhf.rollouts.pairing import RewardScale
from rlhf.rollouts.state import (
    Enqueue,
    Judge,
    Judged,
    JudgeFailed,
    JudgeLost,
    RolloutLimits,
    RolloutState,
    Sample,
    Sampled,
    SampleLost,
    restore,
    snapshot,
)
from rlhf.tables import OnlineDPOConfig
from rlhf.types import Candidate, Pair, Prompt, Score

POLL_S = 1.0
FETCH_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """One candidate to sample. `done(version, image, latents)` gets references; `ticket` < 0 is an evaluation's."""

    ticket: int
    request: SampleRequest
    done: Callable[[int, ray.ObjectRef, ray.ObjectRef], None]


class Rollouts:
    """`load` weights, `take` full batches of pairs, `score` pictures for evaluation; `snapshot`/`restore` for resume."""

    def __init__(
        self,
        config: OnlineDPOConfig,
        prompts: PromptStream,
        judges: Callable[[], ray.actor.ActorHandle],
        placement: PlacementGroup,
    ):
        self.config, self.prompts = config, prompts
        self._placement = placement
        self._limits = RolloutLimits(
            num_valid_samples=config.rollout.num_valid_samples,
            max_sample_attempts=config.rollout.max_sample_attempts,
            max_dropped_in_a_row=config.rollout.max_dropped_in_a_row,
            max_failure_rate=config.judges.max_failure_rate,
        )
        scale = RewardScale(weights=config.reward.mix, scaling=config.reward.scaling)
        self._rollout = RolloutState(limits=self._limits, scale=scale)
        self._waiting: dict[ray.ObjectRef, Callable[[ray.ObjectRef], None]] = {}
        self._queue: list[Work] = []
        self._in_sampling: dict[int, Work] = {}
        self._evaluating: list[Work] | None = None
        """While a list, only its work is dispatched: the samplers may hold weights that no pair may come from."""
        self._publication: Publication | None = None
        self._version_steps: dict[int, int] = {}
        self._actors: dict[int, ray.actor.ActorHandle] = {}
        self._judging = JudgeCalls(config, judges, self._waiting)
        self._busy_s = self._waited_s = 0.0
        self._since = monotonic()
        limits = health.HealthLimits(
            max_restarts=config.samplers.max_restarts,
            start_timeout_s=config.rollout.timeout_s,
            load_timeout_s=config.rollout.timeout_s,
        )
        self._health, commands = health.start(config.samplers.count, limits, monotonic())
        self._carry_out_health(commands)

    # --- what the loop calls -------------------------------------------------------------------------------------------

    @property
    def _training(self) -> bool:
        """Whether what the samplers hold or load is a policy, and not being evaluated: only then may pairs come of it."""
        return self._evaluating is None and self.version in self._version_steps

    @property
    def version(self) -> int:
        """The newest publication's: a counter that never decreases within a driver. EMA publications count too."""
        return self._publication.version if self._publication else -1

    def load(self, publication: Publication, step: int | None) -> None:
        """Make `publication` what every sampler must hold before it samples again. `step` None: not a policy (EMA).

        Does not wait: a busy sampler finishes its batch first, and one whose acknowledged checksum (of the bytes it
        read back) is not the published one stops the run, with `StaleWeights`, when the answer comes.
        """
        self._publication = publication
        if step is not None:
            self._version_steps[publication.version] = step
        self._tell_health(health.Published(version=publication.version, checksum=str(publication.checksum)))

    def take(self, step: int) -> tuple[Pair, ...]:
        """A full batch of pairs for the update after `step` updates; keeps `lookahead` more batches in flight."""
        count, config = self.config.trainer.pairs_per_step, self.config.rollout
        started = monotonic()
        while True:
            ahead = min(config.lookahead, self.config.trainer.max_train_steps - step - 1)
            for cursor in buffer.wanted(self._rollout, count, ahead):
                self._tell_rollout(Enqueue(cursor=cursor, prompt=self.prompts[cursor]))
            self._rollout, pairs = buffer.take(
                self._rollout, count, step=step, max_age=config.oldest, version_steps=self._version_steps
            )
            if pairs:
                self._waited_s += monotonic() - started
                return pairs
            self.pump(POLL_S)

    def score(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[tuple[ray.ObjectRef, Score | Failure]]:
        """Sample one picture per (prompt, noise seed) with the loaded weights and judge it; no pair comes of it."""
        answers: dict[int, tuple[ray.ObjectRef, Any]] = {}
        lost: dict[int, int] = {}

        def judge(index: int, image: ray.ObjectRef) -> None:
            def keep(answer: Score | Failure | PixelsLost | Exception) -> None:
                lost[index] = lost.get(index, 0) + (not isinstance(answer, Score | Failure))
                if isinstance(answer, Score | Failure):
                    answers[index] = (image, answer)
                elif lost[index] > self.config.judges.retries:
                    answers[index] = (image, Failure(judge="filter", reason=f"never judged: {answer}"))
                else:
                    evaluating.append(works[index])

            self._judging.ask(image, prompts[index], keep)

        def sampled(index: int) -> Callable[[int, ray.ObjectRef, ray.ObjectRef], None]:
            return lambda version, image, latents: judge(index, image)

        works = [
            Work(
                ticket=-1 - index,
                request=SampleRequest(prompt=prompt, noise_seed=seed),
                done=sampled(index),
            )
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        self._evaluating = evaluating = list(works)
        while len(answers) < len(prompts):
            self.pump(POLL_S)
        self._evaluating = None
        return [answers[index] for index in range(len(prompts))]

    def metrics(self) -> dict[str, float]:
        """Scalars since the last call, and how much of the time samplers and trainer stood idle (0 … 1)."""
        self._rollout, metrics, notes = rollout.drain(self._rollout)
        if notes:
            print(f"  {len(notes)} groups dropped or candidates quarantined; the last: {notes[-1]}", flush=True)
        elapsed = max(monotonic() - self._since, 1e-9)
        metrics["idle/samplers"] = max(0.0, 1 - self._busy_s / (elapsed * self.config.samplers.count))
        metrics["idle/trainer"] = min(1.0, self._waited_s / elapsed)
        metrics["time/rollout"] = self._waited_s
        self._busy_s = self._waited_s = 0.0
        self._since = monotonic()
        return metrics

    def snapshot(self) -> dict[str, Any]:
        """What a resume needs, JSON-able."""
        return {"rollout": snapshot(self._rollout), "version": self.version}

    def restore(self, saved: dict[str, Any] | None) -> int:
        """Go on from a snapshot (None: from the start); returns the version to publish the restored weights as.

        Whatever is in flight is forgotten: it was sampled by weights that a rollback undid, and its tickets are unknown.
        """
        self._queue, self._evaluating, self._version_steps = [], None, {}
        first_ticket = self._rollout.next_ticket
        if saved is None:
            scale = RewardScale(weights=self.config.reward.mix, scaling=self.config.reward.scaling)
            self._rollout = RolloutState(limits=self._limits, scale=scale, next_ticket=first_ticket)
            return self.version + 1
        self._rollout = restore(saved["rollout"], self._limits, first_ticket=first_ticket)
        return max(saved["version"], self.version + 1)

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._judging.close()
        self._waiting.clear()

    # --- machines and events -------------------------------------------------------------------------------------------

    def _tell_rollout(self, event: Any) -> None:
        self._rollout, commands = rollout.advance(self._rollout, event)
        for command in commands:
            match command:
                case Sample():
                    self._queue.append(self._work(command))
                case Judge():
                    self._judging.ask(command.candidate.image, command.prompt, self._judged(command.ticket))

    def _work(self, command: Sample) -> Work:
        seed = candidate_seed(self.config.run.seed, command.cursor, command.attempt)

        def done(version: int, image: ray.ObjectRef, latents: ray.ObjectRef) -> None:
            candidate = Candidate(
                cursor=command.cursor, attempt=command.attempt, version=version, image=image, latents=latents
            )
            self._tell_rollout(Sampled(ticket=command.ticket, candidate=candidate))

        return Work(ticket=command.ticket, request=SampleRequest(prompt=command.prompt, noise_seed=seed), done=done)

    def _judged(self, ticket: int) -> Callable[[Any], None]:
        def done(answer: Score | Failure | PixelsLost | Exception) -> None:
            match answer:
                case Score() as score:
                    self._tell_rollout(Judged(ticket=ticket, score=score))
                case Failure(judge=judge, reason=reason):
                    self._tell_rollout(JudgeFailed(ticket=ticket, judge=judge, reason=reason))
                case PixelsLost(reason=reason):
                    self._tell_rollout(SampleLost(ticket=ticket, reason=reason))
                case Exception() as error:
                    self._tell_rollout(JudgeLost(ticket=ticket, reason=str(error)))

        return done

    def _tell_health(self, event: Any) -> None:
        self._health, commands = health.advance(self._health, event, monotonic())
        self._carry_out_health(commands)

    def _carry_out_health(self, commands: Sequence[Any]) -> None:
        for command in commands:
            match command:
                case health.Start(sampler=index, generation=generation):
                    self._start(index, generation)
                case health.Kill(sampler=index):
                    ray.kill(self._actors[index])
                case health.Load(sampler=index, generation=generation):
                    self._send_weights(index, generation)
                case health.Reissue(tickets=tickets, reason=reason):
                    self._reissue(tickets, reason)

    def _reissue(self, tickets: Sequence[int], reason: str) -> None:
        for ticket in tickets:
            work = self._in_sampling.pop(ticket)
            if ticket >= 0:
                self._tell_rollout(SampleLost(ticket=ticket, reason=reason))
            elif self._evaluating is not None:
                self._evaluating.append(work)

    # --- samplers ------------------------------------------------------------------------------------------------------

    def _start(self, index: int, generation: int) -> None:
        samplers = self.config.samplers
        bundle = self.config.trainer.ranks + index
        actor = (
            ray.remote(Sampler)
            .options(
                num_cpus=samplers.num_cpus,
                num_gpus=samplers.num_gpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement, placement_group_bundle_index=bundle
                ),
            )
            .remote(self.config, "cuda" if samplers.num_gpus else "cpu")
        )
        self._actors[index] = actor
        started = health.Started(sampler=index, generation=generation)
        self._watch(actor.ready.remote(), index, generation, lambda _: started)

    def _send_weights(self, index: int, generation: int) -> None:
        publication = self._publication
        assert publication is not None
        reference = self._actors[index].load.remote(
            publication.version,
            [buffer.manifest for buffer in publication.buffers],
            *(buffer.reference for buffer in publication.buffers),
        )

        def acknowledged(answer: Any) -> health.Event:
            version, checksum, _ = answer
            return health.LoadAcked(sampler=index, generation=generation, version=version, checksum=str(checksum))

        self._watch(reference, index, generation, acknowledged)

    def _watch(self, reference: ray.ObjectRef, index: int, generation: int, event: Callable[[Any], Any]) -> None:
        """When `reference` is there, tell the health machine `event(value)`, or that the sampler died."""

        def done(reference: ray.ObjectRef) -> None:
            try:
                value = ray.get(reference, timeout=FETCH_TIMEOUT_S)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                self._tell_health(health.Died(sampler=index, generation=generation, reason=reason))
            else:
                self._tell_health(event(value))

        self._waiting[reference] = done

    def _dispatch(self) -> None:
        """Give each healthy sampler a batch of one picture size: evaluation alone, or training under a policy."""
        queue = self._queue if self._evaluating is None else self._evaluating
        if self._evaluating is None and not self._training:
            return  # EMA weights are loaded: the loop publishes the policy again before it takes pairs
        for index in health.healthy(self._health):
            if not queue:
                break
            size = (queue[0].request.prompt.height, queue[0].request.prompt.width)
            batch = [w for w in queue if (w.request.prompt.height, w.request.prompt.width) == size]
            batch = batch[: self.config.rollout.batch_size]
            queue[:] = [work for work in queue if work not in batch]
            self._send_batch(index, batch)

    def _send_batch(self, index: int, batch: list[Work]) -> None:
        generation = self._health.samplers[index].generation
        started = monotonic()
        references = (
            self._actors[index].sample.options(num_returns=1 + 2 * len(batch)).remote([work.request for work in batch])
        )
        self._in_sampling |= {work.ticket: work for work in batch}
        deadline = started + self.config.rollout.timeout_s
        tickets = tuple(work.ticket for work in batch)
        self._tell_health(health.Dispatched(sampler=index, deadline=deadline, tickets=tickets))

        def replied(version: int) -> health.Event:
            self._busy_s += monotonic() - started
            if self._health.samplers[index].generation == generation:
                for position, work in enumerate(batch):
                    self._in_sampling.pop(work.ticket, None)
                    work.done(version, references[1 + 2 * position], references[2 + 2 * position])
            return health.Replied(sampler=index, generation=generation)

        self._watch(references[0], index, generation, replied)

    # --- waiting -------------------------------------------------------------------------------------------------------

    def pump(self, timeout_s: float = 0.0) -> None:
        """Handle whatever is ready, waiting at most `timeout_s` for the first; then let time pass in the machines.

        The loop's other waits call it too, so that samplers and judges never stand still while the trainer works.
        """
        self._dispatch()
        references = list(self._waiting)
        if references:
            ray.wait(references, timeout=timeout_s)
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
            for reference in ready:
                self._waiting.pop(reference)(reference)
        self._dispatch()
        self._judging.watch()
        open_groups = len(self._rollout.open) if self._training else 0
        self._tell_health(health.Tick(open_groups=open_groups, judging=self._judging.pending))
