"""The reference that preferences are measured against: a frozen copy for full fine-tuning, a second adapter for LoRA.

Both are sharded like the policy and refreshed shard to shard, so that a refresh moves no byte between ranks and right after
it the reference's predictions equal the policy's bit for bit.

Shapes: B batch, C latent channels, h w latents.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rlhf.models import lora
from rlhf.models.family import Family
from rlhf.shards import distributed
from rlhf.types import Condition


class FrozenCopy:
    """A second network in the compute dtype: half the memory of the masters, and what FSDP would cast them to anyway."""

    def __init__(self, policy: nn.Module, family: Family, mesh: DeviceMesh):
        module = family.empty_denoiser(family.dtype).eval().requires_grad_(False)
        self._module = distributed.shard(module, family.blocks, mesh, None).to_empty(device=mesh.device_type)
        self._policy, self._family = policy, family
        self.refresh()

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """(B, C, h, w) fp32."""
        return self._family.predict(self._module, x_t, t, condition)

    @torch.no_grad()
    def refresh(self) -> None:
        for mine, theirs in zip(self._module.parameters(), self._policy.parameters(), strict=True):
            mine.to_local().copy_(theirs.to_local())

    def parameters(self) -> Iterator[tuple[str, DTensor]]:
        return self._module.named_parameters()


class SecondAdapter:
    """The policy's own network with its other adapter: costs one adapter."""

    def __init__(self, policy: nn.Module, family: Family):
        self._policy, self._family = policy, family

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """(B, C, h, w) fp32."""
        with lora.using(self._policy, lora.REFERENCE):
            return self._family.predict(self._policy, x_t, t, condition)

    @torch.no_grad()
    def refresh(self) -> None:
        parameters = dict(self._policy.named_parameters())
        for name, mine in self.parameters():
            mine.to_local().copy_(parameters[name.replace(f".{lora.REFERENCE}.", f".{lora.POLICY}.")].to_local())

    def parameters(self) -> Iterator[tuple[str, DTensor]]:
        return ((name, p) for name, p in self._policy.named_parameters() if f".{lora.REFERENCE}." in name)
