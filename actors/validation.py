"""Pictures of fixed prompts from fixed noise while a trainer group trains: its own ranks sample them, and a task decodes them.

So no second copy of the denoiser is anywhere, and training waits for the sampling alone. Left out: judges, and videos.
"""

from collections.abc import Sequence

import ray

from actors.reporting import Reporter
from actors.trainer import TrainerGroup
from rlhf.data.batches import latents_from_array
from rlhf.data.cache import EncodingCache
from rlhf.models import load_family
from rlhf.tables import ModelTable, SamplingTable, ValidationTable
from rlhf.types import Prompt, seed_from


class Validation:
    """`validation(step)`: samples/eval_policy_step_NNNNNN.png, and before the first step eval_base_…."""

    def __init__(
        self,
        model: ModelTable,
        table: ValidationTable,
        prompts: Sequence[Prompt],
        cache: EncodingCache,
        trainer: TrainerGroup,
        tracker: Reporter,
        seed: int,
    ):
        """cache: with the conditions of the prompts."""
        self._model, self._prompts, self._cache = model, prompts, cache
        self._sampling = sampling_of(table)
        self._trainer, self._tracker = trainer, tracker
        self._seeds = [seed_from(seed, "validation", number) for number in range(len(prompts))]

    def __call__(self, step: int) -> None:
        latents = self._trainer.sample(self._cache, self._prompts, self._seeds, self._sampling)
        media = decoded.options(num_returns=len(latents)).remote(self._model, latents)
        media = media if isinstance(media, list) else [media]
        self._tracker.edits(step, "policy" if step else "base", self._prompts, [(one, None) for one in media])


def sampling_of(table: ValidationTable) -> SamplingTable:
    """One picture at a time."""
    keys = {"steps", "guidance_scale", "negative_prompt"}
    return SamplingTable(**table.model_dump(include=keys), batch_size=1)


@ray.remote(num_cpus=0, max_retries=0)
def decoded(model: ModelTable, latents: Sequence[ray.ObjectRef]) -> tuple | object:
    """uint8 (F, H, W, 3) of each of some latents, on the CPU: with one return value for each."""
    codec = load_family(model).load_codec("cpu")
    arrays = ray.get(list(latents))
    media = [codec.decode(latents_from_array(array)[None])[0].numpy() for array in arrays]
    return tuple(media) if len(media) > 1 else media[0]
