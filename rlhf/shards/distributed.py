"""Process group, FSDP2 sharding, sums over ranks. (Optimizers whose state is not elementwise sum over ranks themselves.)

Every parameter of a sharded module is a DTensor whose rows (dimension 0) are spread over the ranks, be it one rank, so nothing
downstream has a special case. Left out: tensor and context parallelism.
"""

import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def start(*, rank: int, world: int, store: dist.Store, device: str, timeout_s: float) -> DeviceMesh:
    """Join the process group over `store`; returns the mesh of all ranks. A collective over `timeout_s` raises."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"  # gloo: norms of gradients that are offloaded
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
    return init_device_mesh(device, (world,), mesh_dim_names=("shard",))


def shard(
    module: nn.Module,
    blocks: tuple[type[nn.Module], ...],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype | None,
    offload: bool = False,
) -> nn.Module:
    """`fully_shard` every block and then the root, in place. `compute_dtype` is what parameters are gathered in.

    offload: shards and their gradients lie in the host's memory, from where FSDP copies a block when it is due.

    Inputs are not cast: the family casts its own, and FSDP's casting would round the fp32 RoPE at every block. Gradients
    are reduced in fp32. The root reshards after forward too, so that shards may be written at any time between steps.
    """
    # Flux's blocks return slices of one tensor. FSDP warns of in-place operations on them; nothing here does any.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    where = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for child in module.modules():
        if isinstance(child, blocks):
            fully_shard(child, mesh=mesh, mp_policy=policy, offload_policy=where)
    return fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=where, reshard_after_forward=True)


def materialise(module: nn.Module, device: str) -> None:
    """Give a sharded module memory for its parameters, yet to be filled. Its buffers stay on the meta device."""
    module.to_empty(device=device)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = torch.empty_like(buffer, device="meta")


def left_on_meta(module: nn.Module) -> list[str]:
    """Dotted names of parameters, buffers and plain attributes that have no memory."""
    found = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    return found + [
        f"{name}.{attribute}".removeprefix(".")
        for name, owner in module.named_modules()
        for attribute, value in vars(owner).items()
        if isinstance(value, Tensor) and value.is_meta
    ]


def first_row(parameter: DTensor) -> int:
    """Global index of the first row that this rank holds (rows may be uneven, and none on some ranks)."""
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0]


def over_ranks(part: Tensor, parameter: DTensor) -> Tensor:
    """The sum of every rank's `part`, over the ranks of a parameter. A collective."""
    return DTensor.from_local(part, parameter.device_mesh, [Partial()], run_check=False).full_tensor()


def mean_over_ranks(values: dict[str, Tensor], device: str) -> dict[str, float]:
    """Average scalars over the ranks in one all-reduce."""
    flat = torch.stack([value.detach().double().cpu() for value in values.values()]).to(device)
    dist.all_reduce(flat)
    return dict(zip(values, (flat / dist.get_world_size()).tolist(), strict=True))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
