"""Peak memory of a trainer rank, told before anything starts: its real step runs on tensors that have shapes and no data.

The trainer is the one that trains, over a process group that sends nothing; torch's `FSDPMemTracker` counts what is alive. The
average of the weights, which it does not see, is added from its shapes. Left out: CUDA's own context, NCCL's buffers and
fragmentation (`actors.cards.RESERVE`).

Shapes: B examples, C latent channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from rlhf.diffusion.objectives import Objective
from rlhf.models.family import Family
from rlhf.models.memory import DEVICE, Peak, empty_condition, without_data
from rlhf.models.trainable import Trainable
from rlhf.shards import distributed
from rlhf.training import optimizers
from rlhf.training.trainer import Trainer
from rlhf.training_tables import TrainerConfig
from rlhf.types import POLICY, Batch, Condition, Prompt

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


@dataclass(kw_only=True, eq=False, repr=False)
class TracedTrainer(Trainer):
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

    def _mean(self, micro_batches: Sequence[Batch], scale: float | None = None) -> dict[str, Tensor]:
        """Gives a gradient to every parameter, also to one that none reaches, so that the norm is that of the same list again."""
        sums = super()._mean(micro_batches, scale)
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return sums

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, side: str = POLICY) -> Tensor:
        if self.tracker:
            self.tracker.reset_mod_stats()  # it allows one call of a network between two resets
        return super().predict(x_t, t, condition, side)


def trainer_peak(
    family: Family, config: TrainerConfig, trainable: Trainable, objective: Objective, prompt: Prompt
) -> Peak:
    """The peak of one rank's step on micro-batches of `prompt`, on the rank that holds the most rows.

    Starts a process group and ends it: this process must have none.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.ranks)
    try:
        return _traced_peak(family, config, trainable, objective, prompt)
    finally:
        dist.destroy_process_group()


def _traced_peak(
    family: Family, config: TrainerConfig, trainable: Trainable, objective: Objective, prompt: Prompt
) -> Peak:
    mesh = init_device_mesh(DEVICE, (config.ranks,), mesh_dim_names=("shard",))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    traced = config.model_copy(update={"ema_decay": None, "optimizer": _stand_in(config.optimizer)})
    trainer = TracedTrainer(
        family=family, config=traced, trainable=trainable, objective=objective, mesh=mesh, seed=0, fake=fake
    )
    with fake:
        optimizers.make_state(trainer.optimizer, trainer.trained.values(), updates=1)
        for parameter in trainer.trained.values():
            parameter.grad = torch.zeros_like(parameter)
        # What DTensor works out once for an operator, it works out on whole tensors without data, which would be counted.
        torch.nn.utils.clip_grad_norm_(trainer.trained.values(), config.max_grad_norm)
        if config.gradient_accumulation_steps == 1:  # otherwise there are those of earlier micro-batches
            trainer.optimizer.zero_grad(set_to_none=True)
        batch = micro_batch(family, objective.roles, prompt, config.train_batch_size)
        trainer.tracker = FSDPMemTracker(trainer.policy, trainer.optimizer)
        with trainer.tracker:
            _show(_frozen(trainer))
            trainer.step([batch])
    return Peak(kinds=_kinds(trainer, config))


def _show(tensors: Sequence[Tensor]) -> None:
    """The tracker counts a tensor that it does not know, for an activation, from the first operation on it: see `_kinds`."""
    for tensor in tensors:
        tensor.detach()


def _frozen(trainer: Trainer) -> list[Tensor]:
    """A rank's rows of the frozen sides that are networks of their own."""
    sides = {} if trainer.trainable.twins else trainer.sides
    return [parameter.to_local() for side in sides.values() for parameter in side.values()]


def _kinds(trainer: TracedTrainer, config: TrainerConfig) -> dict[str, int]:
    """Bytes on the device by kind; what is offloaded is none of them."""
    assert trainer.tracker
    kinds = dict.fromkeys(KINDS.values(), 0)
    for name, nbytes in trainer.tracker.get_tracker_snapshot("peak")[torch.device(DEVICE)].items():
        if name != "Total":
            kinds[KINDS[name.value]] += nbytes
    shard = sum(p.to_local().nbytes for p in trainer.trained.values())
    if config.optimizer == "adamw_8bit":
        kinds["optimizer"] = shard // 4 * 2
    if frozen := sum(rows.untyped_storage().nbytes() for rows in _frozen(trainer)):
        kinds["activations"] -= frozen  # for which the tracker took them
        kinds["frozen sides"] = 0 if config.offloads("reference") else frozen
    if config.ema_decay is not None:
        kinds["average"] = 0 if config.offloads("ema") else shard
    if config.offloads("optimizer"):
        kinds |= {"parameters": 0, "gradients": 0, "optimizer": 0}
    return kinds


def _stand_in(optimizer: str) -> str:
    """bitsandbytes takes no tensors without data: Adafactor stands in, and the state is arithmetic, two bytes a weight."""
    return "adafactor" if optimizer == "adamw_8bit" else optimizer


def micro_batch(family: Family, roles: Sequence[str], prompt: Prompt, size: int) -> Batch:
    """A micro-batch of one prompt again and again, all zeros."""
    shape = (size, *family.latent_shape(prompt.geometry))
    return Batch(
        x0={role: torch.zeros(shape) for role in roles},
        condition=empty_condition(family, prompt, size),
        t=torch.zeros(size),
        noise=torch.zeros(shape),
        weight={role: torch.ones(size) for role in roles},
    )
