"""The scale that keeps fp16 gradients from vanishing, as torch.amp.GradScaler moves it.

GradScaler works on DTensors, but decides by itself, with a collective of its own, whether a step is good; here the one
decision follows from the norm that the trainer has reduced over all ranks already.
"""


class LossScale:
    """`value` is what the loss is multiplied by: doubled after 2000 good steps in a row, halved after a bad one."""

    def __init__(self, value: float = 2.0**16, good_steps: int = 0):
        self.value, self.good_steps = value, good_steps

    def update(self, good: bool) -> None:
        """`good`: the step's gradients were finite. Must be the same on every rank."""
        self.good_steps = self.good_steps + 1 if good else 0
        if not good:
            self.value /= 2
        elif self.good_steps == 2000:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> dict[str, float]:
        """`LossScale(**state)` is this one again."""
        return {"value": self.value, "good_steps": self.good_steps}
