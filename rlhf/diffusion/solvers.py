"""Solvers: how a sampler steps from noise to data. `rlhf.models.sampling` holds the loop; a process says which solver is its own.

A solver keeps its own state x, which need not be the network's input: diffusers' sigma-space schedulers carry x0 + σ·ε and
scale it down before every call. The network always sees x_t and the process time t.
`ddpm.py` wraps those schedulers.

Shapes: B batch, … any latent dimensions.
"""

from typing import Protocol

from torch import Tensor


class Solver(Protocol):
    """One use: `begin`, then for every index i of `times`, in order, a network call on `x_t(x, i)` and `step`."""

    @property
    def times(self) -> Tensor:
        """Process times of the network calls, 1 … 0 (any number of them for the steps asked for)."""

    def begin(self, noise: Tensor) -> Tensor:
        """The state x before the first step, from standard normal noise (B, …) in fp32."""

    def x_t(self, x: Tensor, i: int) -> Tensor:
        """The network's input for the i-th call."""

    def step(self, x: Tensor, i: int, prediction: Tensor) -> Tensor:
        """The next state from the network's output for `x_t(x, i)`; after the last step it is x0."""


class Euler:
    """Euler's method for a velocity: x += (σ' − σ)·v along decreasing `sigmas` (steps + 1,), the last of them 0."""

    def __init__(self, sigmas: Tensor):
        self.sigmas, self.times = sigmas, sigmas[:-1]

    def begin(self, noise: Tensor) -> Tensor:
        return noise

    def x_t(self, x: Tensor, i: int) -> Tensor:
        return x

    def step(self, x: Tensor, i: int, prediction: Tensor) -> Tensor:
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * prediction
