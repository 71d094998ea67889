"""Online DPO on the miniature world in this process, without Ray: real sampler, judges, pairs, publish, loop and trainer.

It answers whether online DPO learns: a run's measure is the true click rate of held-out edits at fixed noise, which no reward is
given. It is compared with runs whose rewards are shuffled within each prompt, which move the rate too; the spread over prompts is
far too small to judge by. A run with β's sign flipped must lose what a true run gains.
Left out: the filter, and several processes, which the demo has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.distributed.device_mesh import DeviceMesh

from actors.sampler import Sampler, SampleRequest
from jobs.one_process import Handed, OneRank, train_in
from jobs.world.edits import GEOMETRY, model_of
from jobs.world.looks import EMPTY_PROMPT
from jobs.world.truth import kept, product_of, true_rate
from rlhf.data.audit import candidate_seed
from rlhf.data.cache import EncodingCache, commit, write_part
from rlhf.data.encoding import encode_rows
from rlhf.data.fingerprint import fingerprints
from rlhf.data.prompts import PromptStream, read_prompts
from rlhf.data.sources import seen_source
from rlhf.data.work import OnlineWork
from rlhf.diffusion.objectives import DPO
from rlhf.loops.train import Duty
from rlhf.models import load_family
from rlhf.models.trainable import load_trainable
from rlhf.rewards.config import CTRJudgeConfig, HPSJudgeConfig
from rlhf.rewards.ctr.model import CTRReward
from rlhf.rewards.hpsv2 import HPSv2Reward
from rlhf.rollouts.pairing import RewardScale, RolloutGroup, make_pair
from rlhf.runs.folder import RunFolder
from rlhf.shards import buffers
from rlhf.tables import SamplingTable
from rlhf.training.trainer import Trainer
from rlhf.training_tables import TrainableTable, TrainerConfig
from rlhf.types import REFERENCE, Candidate, Prompt, Score, Verdict, seed_from

Mode = Literal["true", "shuffled", "flipped"]
GROUPS, CANDIDATES, REFRESH_EVERY = 8, 4, 20
SAMPLING = SamplingTable(steps=4, batch_size=16)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of all held-out edits at fixed noise, by prompt."""

    true_rate: np.ndarray
    reward: np.ndarray
    """hps and ctr, as they are: (prompts, 2)."""
    kept: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run is trained with."""

    trainable: TrainableTable
    beta: float = 500.0
    learning_rate: float = 5e-5
    steps: int = 40
    every: int = 20
    """Updates between two measurements."""


class Bench:
    """A world's edit model, prompts and judges, loaded once for any number of runs."""

    def __init__(self, world: Path, data: Path, work: Path, mesh: DeviceMesh, held_out: int):
        """world: of the models; data: of the photos; work: for the cache and the runs. held_out: prompts that are measured."""
        self.model, self.mesh, self.work = model_of(world / "kontext"), mesh, work
        self.family = load_family(self.model)

        def prompts(name: str) -> tuple[Prompt, ...]:
            file, items = data / f"{name}_metadata.jsonl", data / "ctr_metadata.csv"
            return read_prompts(file, "crop", lambda h, w: GEOMETRY, item_metadata=items).prompts

        self.train, self.held_out = prompts("train"), prompts("eval")[:held_out]
        self.cache = EncodingCache(work / "cache", fingerprints(self.family))
        wanted = [encoding for prompt in (*self.train, *self.held_out) for encoding in self.family.encodings(prompt)]
        rows = encode_rows(self.family.load_codec("cpu"), wanted, 16)
        commit(self.cache.folder, [write_part(self.cache.folder, {self.cache.key(e): row for e, row in rows.items()})])
        self.judges = {
            "hps": HPSv2Reward("hps", HPSJudgeConfig(path=str(world / "hps" / "hps.safetensors")), "cpu"),
            "ctr": CTRReward("ctr", CTRJudgeConfig(path=str(world / "ctr")), "cpu"),
        }

    def rewards(self, media: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> dict[str, list[float]]:
        texts = [prompt.instruction or EMPTY_PROMPT for prompt in prompts]
        items, sources = [prompt.item for prompt in prompts], [()] * len(prompts)
        return {name: judge.score(media, texts, sources, items) for name, judge in self.judges.items()}

    def learn(self, mode: Mode, seed: int, recipe: Recipe) -> list[tuple[int, Measured]]:
        """(step, what was measured) of one run."""
        config = TrainerConfig(
            train_batch_size=GROUPS,
            gradient_accumulation_steps=1,
            learning_rate=recipe.learning_rate,
            lr_warmup_steps=10,
            max_train_steps=recipe.steps,
            gradient_checkpointing="none",
            weight_decay=0.0,
        )
        name = f"{mode}_{recipe.trainable.kind}_{seed}"
        run = RunFolder.claim(self.work / "runs", name, "", resume="never")
        trainable = load_trainable(recipe.trainable, self.family)
        work = OnlineWork(config, self.cache, run.path / "pairs", run.fence, seed=seed, save_latents=False)
        beta = -recipe.beta if mode == "flipped" else recipe.beta
        ranks = OneRank(self.model, config, DPO(beta=beta), work, self.mesh, seed, trainable)
        sampler = Sampler(self.model, SAMPLING, "cpu", trainable=trainable, cache=self.cache)
        source = RatedPairs(self, sampler, ranks.trainer, seed=seed, shuffled=mode == "shuffled")
        duties = [
            Duty(every=REFRESH_EVERY, do=lambda step: ranks.trainer.refresh(REFERENCE)),
            Duty(every=1, do=source.publish),
        ]
        return train_in(run, source, ranks, duties, measure=source.measure, every=recipe.every)


class RatedPairs:
    """The source of work: pairs of what the published policy samples, by the judges. A run is never resumed."""

    def __init__(self, bench: Bench, sampler: Sampler, trainer: Trainer, *, seed: int, shuffled: bool):
        self._bench, self._sampler, self._trainer = bench, sampler, trainer
        self._seed, self._prompts = seed, PromptStream(bench.train, seed)
        self._shuffle = np.random.default_rng(seed) if shuffled else None
        self._scale = RewardScale(weights=dict.fromkeys(bench.judges, 1.0))

    def metrics(self) -> dict[str, float]:
        return {}

    def snapshot(self) -> dict[str, Any]:
        return {}

    def restore(self, step: int, saved: Mapping[str, Any] | None) -> None:
        self.publish(step)

    def publish(self, step: int) -> None:
        """Make the sampler hold the trainer's weights."""
        arrays, manifests = zip(*buffers.pack(self._trainer.shards()), strict=True)
        _, read_back = self._sampler.load(step, manifests, *arrays)
        assert read_back == tuple(manifest.checksum for manifest in manifests)

    def measure(self) -> Measured:
        prompts = self._bench.held_out
        media, _ = self._sample(prompts, [seed_from("held out", index) for index in range(len(prompts))])
        edits = np.concatenate(media)
        sources = np.concatenate([seen_source(prompt.sources[0], prompt.geometry) for prompt in prompts])
        rewards = self._bench.rewards(media, prompts)
        products = [product_of(prompt.item) for prompt in prompts]
        return Measured(
            true_rate=true_rate(edits, products).numpy(),
            reward=np.array(list(rewards.values())).T,
            kept=kept(sources, edits).numpy(),
        )

    def take(self, step: int) -> list[Handed]:
        attempts = [(step * GROUPS + index, attempt) for index in range(GROUPS) for attempt in range(CANDIDATES)]
        prompts = [self._prompts[cursor] for cursor, _ in attempts]
        media, latents = self._sample(prompts, [candidate_seed(self._seed, *attempt) for attempt in attempts])
        rewards = {name: np.array(values) for name, values in self._bench.rewards(media, prompts).items()}
        if self._shuffle is not None:
            order = self._shuffle.permuted(np.arange(len(attempts)).reshape(GROUPS, CANDIDATES), axis=1).ravel()
            rewards = {name: values[order] for name, values in rewards.items()}
        candidates = [
            Candidate(cursor=cursor, attempt=attempt, version=step, media=None, latents=array)
            for (cursor, attempt), array in zip(attempts, latents, strict=True)
        ]
        scores = [
            Score(verdict=Verdict(valid=True), rewards={name: float(values[place]) for name, values in rewards.items()})
            for place in range(len(attempts))
        ]
        groups = [
            RolloutGroup(
                cursor=candidates[first].cursor,
                prompt=prompts[first],
                candidates=tuple(candidates[first : first + CANDIDATES]),
                scores=tuple(scores[first : first + CANDIDATES]),
            )
            for first in range(0, len(attempts), CANDIDATES)
        ]
        self._scale = self._scale.observe(groups)
        pairs = [pair for group in groups if (pair := make_pair(group, self._scale.parts(group)))]
        return [(pairs, [side.latents for pair in pairs for side in (pair.winner, pair.loser)])]

    def _sample(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Each one's uint8 (F, H, W, 3) and latents."""
        size, results = SAMPLING.batch_size, list[Any]()
        requests = [
            SampleRequest(prompt=prompt, noise_seed=seed, slot=index % size)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        for start in range(0, len(requests), size):
            results += self._sampler.sample(requests[start : start + size])[1:]
        return results[::2], results[1::2]
