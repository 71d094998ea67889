"""Rollouts: from the prompt stream to full batches of pairs, and scores of held-out prompts.

The shell around the prompts' state machine (`rlhf.rollouts`): it carries out what that decides (sample, judge) with the
samplers (`fleet.py`) and the judges (`judging.py`), and tells it what happened. Everything it waits for is an object reference
with a handler, in one table; every wait is bounded. It holds references, scores and counters only.
"""

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import ray

from actors.fleet import Fleet, Work
from actors.judges import Answer, Failure, PixelsLost
from actors.judging import JudgesDied, Judging, Waiting
from actors.publication import Publication
from actors.sampler import SampleRequest
from rlhf.data.audit import candidate_seed
from rlhf.data.prompts import PromptStream
from rlhf.models.family import Family
from rlhf.rewards.config import JudgesConfig, RewardConfig
from rlhf.rollouts import buffer, rollout
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
from rlhf.tables import RolloutConfig, SamplingTable
from rlhf.types import Candidate, Pair, Prompt, Score

POLL_S = 1.0


class Rollouts:
    """`load` weights, `take` full batches of pairs, `score` pictures for evaluation; `snapshot`/`restore` for resume."""

    def __init__(
        self,
        rollout: RolloutConfig,
        sampling: SamplingTable,
        reward: RewardConfig,
        judges: JudgesConfig,
        *,
        pairs_per_step: int,
        steps: int,
        seed: int,
        prompts: PromptStream,
        family: Family,
        fleet: Fleet,
        judging: Judging,
        waiting: Waiting,
    ):
        """steps: updates of the whole run; waiting: the table that `fleet` and `judging` were given."""
        self._config, self._sampling, self._reward, self._judges = rollout, sampling, reward, judges
        self._pairs_per_step, self._steps, self._seed = pairs_per_step, steps, seed
        self._prompts, self._family = prompts, family
        self._fleet, self._judging, self._waiting = fleet, judging, waiting
        self._limits = RolloutLimits(
            num_valid_samples=rollout.num_valid_samples,
            max_sample_attempts=rollout.max_sample_attempts,
            max_dropped_in_a_row=rollout.max_dropped_in_a_row,
            max_failure_rate=judges.max_failure_rate,
        )
        self._rollout = RolloutState(limits=self._limits, scale=self._fresh_scale())
        self._queue: list[Work] = []
        self._evaluating: list[Work] | None = None
        """While a list, only its work is dispatched: the samplers may hold weights that no pair may come from."""
        self._version_steps: dict[int, int] = {}
        self._waited_s = 0.0
        self._since = monotonic()

    def _fresh_scale(self) -> RewardScale:
        return RewardScale(weights=self._reward.mix, scaling=self._reward.scaling)

    # --- what the loop calls -------------------------------------------------------------------------------------------

    @property
    def _training(self) -> bool:
        """Whether what the samplers hold or load is a policy, and not being evaluated: only then may pairs come of it."""
        return self._evaluating is None and self.version in self._version_steps

    @property
    def version(self) -> int:
        """The newest publication's: a counter that never decreases within a driver. EMA publications count too."""
        return self._fleet.version

    def load(self, publication: Publication, step: int | None) -> None:
        """Make `publication` what every sampler must hold before it samples again. `step` None: not a policy (EMA)."""
        if step is not None:
            self._version_steps[publication.version] = step
        self._fleet.load(publication)

    def take(self, step: int) -> tuple[Pair, ...]:
        """A full batch of pairs for the update after `step` updates; keeps `lookahead` more batches in flight."""
        count, config = self._pairs_per_step, self._config
        started = monotonic()
        while True:
            ahead = min(config.lookahead, self._steps - step - 1)
            for cursor in buffer.wanted(self._rollout, count, ahead):
                self._tell(Enqueue(cursor=cursor, prompt=self._prompts[cursor]))
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

        def judge(index: int, media: ray.ObjectRef) -> None:
            def keep(answer: Answer | PixelsLost | JudgesDied) -> None:
                lost[index] = lost.get(index, 0) + (not isinstance(answer, Answer))
                if isinstance(answer, Answer):
                    answers[index] = (media, answer.whole())
                elif lost[index] > self._judges.retries:
                    answers[index] = (media, Failure(judge="filter", reason=f"never judged: {answer.reason}"))
                else:
                    evaluating.append(works[index])

            self._judging.ask(media, prompts[index], keep)

        def work(index: int, prompt: Prompt, seed: int) -> Work:
            return Work(
                ticket=-1 - index,
                bucket=self._family.bucket(prompt),
                request=SampleRequest(prompt=prompt, noise_seed=seed, slot=index % self._sampling.batch_size),
                done=lambda version, media, latents: judge(index, media),
                lost=lambda reason: evaluating.append(works[index]),
            )

        works = [work(index, *of) for index, of in enumerate(zip(prompts, seeds, strict=True))]
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
        metrics["idle/samplers"] = max(0.0, 1 - self._fleet.busy_s / (elapsed * self._fleet.count))
        metrics["idle/trainer"] = min(1.0, self._waited_s / elapsed)
        metrics["time/rollout"] = self._waited_s
        self._fleet.busy_s = self._waited_s = 0.0
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
            self._rollout = RolloutState(limits=self._limits, scale=self._fresh_scale(), next_ticket=first_ticket)
            return self.version + 1
        self._rollout = restore(saved["rollout"], self._limits, first_ticket=first_ticket)
        return max(saved["version"], self.version + 1)

    def close(self) -> None:
        self._fleet.close()
        self._judging.close()
        self._waiting.clear()

    # --- the machine ---------------------------------------------------------------------------------------------------

    def _tell(self, event: Any) -> None:
        self._rollout, commands = rollout.advance(self._rollout, event)
        for command in commands:
            match command:
                case Sample():
                    self._queue.append(self._work(command))
                case Judge():
                    self._judging.ask(command.candidate.media, command.prompt, self._judged(command.ticket))

    def _work(self, command: Sample) -> Work:
        """A candidate's place in a batch follows from its cursor and attempt alone, so that a replay gives it the same one."""
        cursor, attempt = command.cursor, command.attempt

        def done(version: int, media: ray.ObjectRef, latents: ray.ObjectRef) -> None:
            candidate = Candidate(cursor=cursor, attempt=attempt, version=version, media=media, latents=latents)
            self._tell(Sampled(ticket=command.ticket, candidate=candidate))

        return Work(
            ticket=command.ticket,
            bucket=self._family.bucket(command.prompt),
            request=SampleRequest(
                prompt=command.prompt,
                noise_seed=candidate_seed(self._seed, cursor, attempt),
                slot=(cursor * self._config.num_valid_samples + attempt) % self._sampling.batch_size,
            ),
            done=done,
            lost=lambda reason: self._tell(SampleLost(ticket=command.ticket, reason=reason)),
        )

    def _judged(self, ticket: int) -> Callable[[Any], None]:
        def done(answer: Answer | PixelsLost | JudgesDied) -> None:
            match answer.whole() if isinstance(answer, Answer) else answer:
                case Score() as score:
                    self._tell(Judged(ticket=ticket, score=score))
                case Failure(judge=judge, reason=reason):
                    self._tell(JudgeFailed(ticket=ticket, judge=judge, reason=reason))
                case PixelsLost(reason=reason):
                    self._tell(SampleLost(ticket=ticket, reason=reason))
                case JudgesDied(reason=reason):
                    self._tell(JudgeLost(ticket=ticket, reason=reason))

        return done

    # --- waiting -------------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Evaluation alone, or training under a policy. With EMA weights loaded nothing is sampled for pairs."""
        if self._evaluating is not None:
            self._fleet.dispatch(self._evaluating)
        elif self._training:
            self._fleet.dispatch(self._queue)

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
        self._fleet.tick(open_groups=len(self._rollout.open) if self._training else 0, judging=self._judging.pending)
