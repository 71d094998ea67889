"""Pictures of prompts: a denoiser on one device, batches of one size, and a fixed place in it for each picture.

Left out: decoding, which the codec does, and what is done with the pictures.

Shapes: B batch, C latent channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf.data.batches import ReadRow, condition_of, other_branch, unguided_of
from rlhf.data.encoding import encode_rows
from rlhf.models.family import Codec, Family, sample_batch
from rlhf.tables import SamplingTable
from rlhf.types import Encoded, Encoding, Prompt, noise_from


def sample_prompts(
    family: Family,
    denoiser: nn.Module,
    row: ReadRow,
    sampling: SamplingTable,
    device: str,
    *,
    prompts: Sequence[Prompt],
    noise_seeds: Sequence[int],
    slots: Sequence[int],
) -> Tensor:
    """x0 (sampling.batch_size, C, …) fp32: of each prompt, at its slot, from noise of its own seed. All are of one bucket.

    slots: each prompt's place in the batch, all different. A row's bits may depend on its place, here and when it is decoded,
    so whoever repeats a sample gives it the same one. Free places hold the first prompt and zero noise.
    """
    assert len(set(slots)) == len(prompts) <= sampling.batch_size, f"slots {slots} for {len(prompts)} prompts"
    placed = [prompts[0]] * sampling.batch_size
    noise = torch.zeros(sampling.batch_size, *family.latent_shape(prompts[0].geometry))
    for prompt, seed, slot in zip(prompts, noise_seeds, slots, strict=True):
        placed[slot], noise[slot] = prompt, noise_from(seed, noise.shape[1:])
    condition = condition_of(family, row, placed)
    unguided = unguided_of(family, row, placed, sampling)
    condition = {name: tensor.to(device) for name, tensor in condition.items()}
    if unguided is not None:
        unguided = {name: tensor.to(device) for name, tensor in unguided.items()}
    return sample_batch(family, denoiser, condition, unguided, noise.to(device), sampling)


def encoded_now(
    family: Family, codec: Codec, prompts: Sequence[Prompt], sampling: SamplingTable
) -> dict[Encoding, Encoded]:
    """The rows that sampling these prompts needs, encoded here in batches of `sampling.batch_size`.

    Raises: OSError, Refused for a source that has changed.
    """
    wanted = [encoding for prompt in prompts for encoding in encodings_for_sampling(family, prompt, sampling)]
    return encode_rows(codec, wanted, sampling.batch_size)


def encodings_for_sampling(family: Family, prompt: Prompt, sampling: SamplingTable) -> tuple[Encoding, ...]:
    """What sampling a prompt needs: its own encodings and, where guidance has two branches, the other prompt's."""
    other = other_branch(family, prompt, sampling)
    return (*family.encodings(prompt), *(family.encodings(other) if other else ()))
