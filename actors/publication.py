"""Publishing: trained weights from trainer ranks to samplers through the object store, by rows and with proof.

Each rank puts its own rows as flat uint8 buffers (zero-copy for every reader on a node; a pickled tensor would be copied
by each). A publication holds references only, so the driver never sees a weight.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import ray

from rlhf.shards.buffers import BufferManifest, pack
from rlhf.shards.files import Shard

Published = tuple[ray.ObjectRef, BufferManifest]
"""One buffer in the object store and what lies in it."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """One version of the trained weights, complete over all ranks."""

    version: int
    buffers: tuple[Published, ...]

    @property
    def checksum(self) -> tuple[int, ...]:
        """What a sampler must read back from its own weights after loading: one xxh3-64 per buffer."""
        return tuple(manifest.checksum for _, manifest in self.buffers)


def put(shards: Iterable[Shard]) -> list[Published]:
    """Put one rank's rows into the object store, a buffer at a time."""
    return [(ray.put(buffer), manifest) for buffer, manifest in pack(shards)]
