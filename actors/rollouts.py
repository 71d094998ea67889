"""Rollouts: from the prompt stream to full batches of pairs, and scores of held-out prompts.

The shell around the prompts' state machine (`rlhf.rollouts`): it carries out what that decides (sample, judge) with the
samplers (`fleet.py`) and the judges (`judging.py`), and tells it what happened. Whatever it waits for is an object reference
with a handler, in one table. It holds references, scores and counters only.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import Any

import ray

from actors.fleet import Fleet, SampleWork
from actors.judges import Answer, Failure, PixelsLost
from actors.judging import JudgesDied, Judging, Outcome, handle_ready
from actors.publication import Publication
from actors.sampler import SampleRequest
from rlhf.data.audit import candidate_seed
from rlhf.data.prompts import PromptStream
from rlhf.models.family import Family
from rlhf.rewards.config import JudgesConfig, RewardConfig
from rlhf.rollouts import buffer, rollout
from rlhf.rollouts.pairing import RewardScale
from rlhf.rollouts.state import Judge, RolloutState, Sample, restore, snapshot
from rlhf.tables import RolloutConfig, SamplingTable
from rlhf.training_tables import TrainerConfig
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
        trainer: TrainerConfig,
        *,
        seed: int,
        prompts: PromptStream,
        family: Family,
        fleet: Fleet,
        judging: Judging,
    ):
        """fleet and judging share their table of what is waited for."""
        self._config, self._sampling, self._judges, self._trainer = rollout, sampling, judges, trainer
        self._seed, self._prompts, self._family, self._fleet, self._judging = seed, prompts, family, fleet, judging
        self._fresh = partial(
            RolloutState,
            config=rollout,
            max_failure_rate=judges.max_failure_rate,
            scale=RewardScale(weights=reward.mix, scaling=reward.scaling),
        )
        self._rollout = self._fresh()
        self._queue: list[SampleWork] = []
        self._evaluating: list[SampleWork] | None = None
        """While a list, only its work is dispatched: the samplers may hold weights that no pair may come from."""
        self._version_steps: dict[int, int] = {}
        self._waited_s, self._since = 0.0, monotonic()

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
        count, config, started = self._trainer.pairs_per_step, self._config, monotonic()
        while True:
            ahead = min(config.lookahead, self._trainer.max_train_steps - step - 1)
            for cursor in buffer.wanted(self._rollout, count, ahead):
                self._obey(rollout.enqueue(self._rollout, cursor, self._prompts[cursor]))
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
        works: list[SampleWork] = []
        todo: list[SampleWork] = []
        unjudged = Counter[int]()

        def judged(index: int, media: ray.ObjectRef, answer: Outcome) -> None:
            if isinstance(answer, Answer):
                answers[index] = (media, answer.whole())
                return
            unjudged[index] += 1
            if unjudged[index] > self._judges.retries:
                answers[index] = (media, Failure(judge="filter", reason=f"never judged: {answer.reason}"))
            else:
                todo.append(works[index])

        def work(index: int, prompt: Prompt, seed: int) -> SampleWork:
            return SampleWork(
                ticket=-1 - index,
                bucket=self._family.bucket(prompt),
                request=SampleRequest(prompt=prompt, noise_seed=seed, slot=index % self._sampling.batch_size),
                done=lambda version, media, latents: self._judging.ask(media, prompt, partial(judged, index, media)),
                lost=lambda reason: todo.append(works[index]),
            )

        works += [work(index, *of) for index, of in enumerate(zip(prompts, seeds, strict=True))]
        todo += works
        self._evaluating = todo
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
        self._fleet.busy_s, self._waited_s, self._since = 0.0, 0.0, monotonic()
        return metrics

    def snapshot(self) -> dict[str, Any]:
        """What a resume needs, JSON-able."""
        return {"rollout": snapshot(self._rollout), "version": self.version}

    def restore(self, saved: dict[str, Any] | None) -> int:
        """Go on from a snapshot (None: from the start); returns the version to publish the restored weights as.

        Whatever is in flight is forgotten: it was sampled by weights that a rollback undid, and its tickets are unknown.
        """
        self._queue, self._evaluating, self._version_steps = [], None, {}
        if saved is None:
            self._rollout = self._fresh(next_ticket=self._rollout.next_ticket)
            return self.version + 1
        self._rollout = restore(saved["rollout"], self._rollout)
        return max(saved["version"], self.version + 1)

    def close(self) -> None:
        self._fleet.close()
        self._judging.close()
        self._judging.waiting.clear()

    def _obey(self, decided: rollout.Next) -> None:
        self._rollout, commands = decided
        for command in commands:
            match command:
                case Sample():
                    self._queue.append(self._work(command))
                case Judge(ticket=ticket, candidate=candidate, prompt=prompt):
                    self._judging.ask(candidate.media, prompt, partial(self._judged, ticket))

    def _work(self, command: Sample) -> SampleWork:
        """A candidate's place in a batch follows from its cursor and attempt alone, so that a replay gives it the same one."""
        ticket, cursor, attempt = command.ticket, command.cursor, command.attempt
        slot = (cursor * self._config.num_valid_samples + attempt) % self._sampling.batch_size
        noise_seed = candidate_seed(self._seed, cursor, attempt)

        def done(version: int, media: ray.ObjectRef, latents: ray.ObjectRef) -> None:
            candidate = Candidate(cursor=cursor, attempt=attempt, version=version, media=media, latents=latents)
            self._obey(rollout.sampled(self._rollout, ticket, candidate))

        return SampleWork(
            ticket=ticket,
            bucket=self._family.bucket(command.prompt),
            request=SampleRequest(prompt=command.prompt, noise_seed=noise_seed, slot=slot),
            done=done,
            lost=lambda reason: self._obey(rollout.sample_lost(self._rollout, ticket)),
        )

    def _judged(self, ticket: int, answer: Outcome) -> None:
        match answer.whole() if isinstance(answer, Answer) else answer:
            case Score() as score:
                self._obey(rollout.judged(self._rollout, ticket, score))
            case Failure(judge=judge, reason=reason):
                self._obey(rollout.judge_failed(self._rollout, ticket, judge, reason))
            case PixelsLost():
                self._obey(rollout.sample_lost(self._rollout, ticket))
            case JudgesDied():
                self._obey(rollout.judge_lost(self._rollout, ticket))

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
        handle_ready(self._judging.waiting, timeout_s)
        self._dispatch()
        self._judging.watch()
        self._fleet.tick(open_groups=len(self._rollout.open) if self._training else 0, judging=self._judging.pending)
