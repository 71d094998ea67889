"""The exponential moving average of a rank's rows of the weights, on its device or, offloaded, in the host's memory."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Average:
    """average ← decay · average + (1 − decay) · weights, in fp32.

    Offloaded, a thread copies the weights over and averages them while the next step computes: call `wait` before the weights
    change.
    """

    def __init__(self, trained: Mapping[str, DTensor], decay: float, *, offload: bool):
        self._trained, self._decay = trained, decay
        self._rows = {name: _copy(parameter.to_local().detach(), offload) for name, parameter in trained.items()}
        self._thread = ThreadPoolExecutor(max_workers=1) if offload else None
        self._stream = torch.cuda.Stream() if offload and torch.cuda.is_available() else None
        self._pending: Future[None] | None = None

    def update(self) -> None:
        """Follow the weights as they are now."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        if self._thread:
            self._pending = self._thread.submit(self._update)
        else:
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        with torch.cuda.stream(self._stream):
            for name, rows in self._rows.items():
                rows.lerp_(self._trained[name].to_local().to(rows.device), 1 - self._decay)

    def wait(self) -> None:
        """Until the last update is done. Raises what it raised."""
        if self._pending:
            pending, self._pending = self._pending, None
            pending.result()

    @property
    def rows(self) -> Mapping[str, Tensor]:
        """By name; the tensors themselves, for whoever fills them in."""
        self.wait()
        return self._rows


def _copy(rows: Tensor, offload: bool) -> Tensor:
    if not offload:
        return rows.clone()
    copy = torch.empty_like(rows, device="cpu", pin_memory=rows.is_cuda)
    return copy.copy_(rows)
