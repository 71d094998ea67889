"""Peak memory of a trainer rank, told before anything starts: its real step runs on tensors that have shapes and no data.

The trainer is the one that trains, over a process group that sends nothing; torch's `FSDPMemTracker` counts what is alive. What
the tracker does not see, the frozen sides that are networks of their own and the average of the weights, is added from its
shapes. Left out: CUDA's own context, NCCL's buffers and fragmentation, for which `RESERVE` stands.

Shapes: B examples, C latent channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from rlhf.diffusion.objectives import Objective
from rlhf.models.family import Family
from rlhf.models.trainable import Trainable
from rlhf.shards import distributed
from rlhf.tables import TrainerConfig
from rlhf.training import optimizers
from rlhf.training.trainer import Trainer
from rlhf.types import POLICY, Batch, Condition, Prompt

DEVICE = "cpu"
"""Of the tensors without data: the sizes are those of any device."""
KINDS = {
    "Sharded Param": "parameters",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "OptState": "optimizer",
    "Unsharded Param": "gathered",
    "All Gather": "gathered",
    "Reduce Scatter": "gathered",
    "Buffer": "activations",
    "Inputs": "activations",
    "Activation": "activations",
    "Temp": "temporaries",
}
"""What the tracker calls them, and what they are called here."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes of a process at its peak, by kind."""

    kinds: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        return sum(self.kinds.values())


class Rehearsal(Trainer):
    """A trainer whose tensors have no data, and whose averages over ranks are zeros."""

    fake: FakeTensorMode
    tracker: FSDPMemTracker | None = None

    def _materialise(self, network: nn.Module, compute_dtype: torch.dtype | None, offload: bool) -> None:
        without_data(network, self.fake)
        distributed.shard(network, self.family.blocks, self.mesh, compute_dtype)
        self.family.finish(network, self.device)

    def _fill(self, denoiser: nn.Module) -> None:
        pass

    def _over_ranks(self, values: dict[str, Tensor]) -> dict[str, float]:
        return dict.fromkeys(values, 0.0)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, side: str = POLICY) -> Tensor:
        if self.tracker:
            self.tracker.reset_mod_stats()  # it allows one call of a network between two resets
        return super().predict(x_t, t, condition, side)


def without_data(network: nn.Module, fake: FakeTensorMode) -> None:
    """Turn the parameters and buffers of a network on the meta device into tensors of `fake`."""
    for owner in network.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                tensor = FakeTensor(fake, parameter.data, torch.device(DEVICE))
                owner._parameters[name] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_meta:
                owner._buffers[name] = FakeTensor(fake, buffer, torch.device(DEVICE))


def trainer_peak(
    family: Family, config: TrainerConfig, trainable: Trainable, objective: Objective, prompt: Prompt
) -> Peak:
    """The peak of one rank's step on micro-batches of `prompt`, on the rank that holds the most rows.

    In a process of its own: it starts a process group.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.ranks)
    mesh = init_device_mesh(DEVICE, (config.ranks,), mesh_dim_names=("shard",))
    Rehearsal.fake = fake = FakeTensorMode(allow_non_fake_inputs=True)
    traced = config.model_copy(update={"ema_decay": None, "optimizer": _traced(config.optimizer)})
    trainer = Rehearsal(
        family=family, config=traced, trainable=trainable, objective=objective, mesh=mesh, seed=0
    )
    with fake:
        optimizers.make_state(trainer.optimizer, trainer.trained.values(), updates=1)
        for parameter in trainer.trained.values():
            parameter.grad = torch.zeros_like(parameter)
        # What DTensor works out once for an operator, it works out on whole tensors without data, which would be counted.
        torch.nn.utils.clip_grad_norm_(trainer.trained.values(), config.max_grad_norm)
        if config.gradient_accumulation_steps == 1:  # otherwise there are those of earlier micro-batches
            trainer.optimizer.zero_grad(set_to_none=True)
        batch = _batch(family, objective.roles, prompt, config.train_batch_size)
        trainer.tracker = FSDPMemTracker(trainer.policy, trainer.optimizer)
        with trainer.tracker:
            trainer.step([batch])
    kinds = dict.fromkeys(KINDS.values(), 0)
    for name, nbytes in trainer.tracker.get_tracker_snapshot("peak")[torch.device(DEVICE)].items():
        if name != "Total":
            kinds[KINDS[name.value]] += nbytes
    shard = sum(p.to_local().nbytes for p in trainer.trained.values())
    if not trainable.twins:
        kinds["frozen sides"] = sum(
            p.to_local().nbytes for side in trainer.sides.values() for p in side.values()
        )
    if config.ema_decay is not None:
        kinds["average of the weights"] = shard
    return Peak(kinds=kinds)


def _traced(optimizer: str) -> str:
    """bitsandbytes takes no tensors without data: Adafactor stands in, and the state is arithmetic."""
    return "adafactor" if optimizer == "adamw_8bit" else optimizer


def _batch(family: Family, roles: Sequence[str], prompt: Prompt, size: int) -> Batch:
    """A micro-batch of one prompt again and again; call it where tensors have no data."""
    rows = [
        {name: torch.zeros_like(tensor, device=DEVICE) for name, tensor in family.empty_row(encoding).items()}
        for encoding in family.encodings(prompt)
    ]
    shape = (size, *family.latent_shape(prompt.geometry))
    return Batch(
        x0={role: torch.zeros(shape) for role in roles},
        condition=family.condition([rows] * size, family.bucket(prompt)),
        t=torch.zeros(size),
        noise=torch.zeros(shape),
        weight={role: torch.ones(size) for role in roles},
    )
