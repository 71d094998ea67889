"""What `jobs.train_ctr` reads: the click log, the backbones, and how to train."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from rlhf.section import ClusterConfig, LocalPath, Section

LEARNING_RATE, SMALL_LEARNING_RATE = 1e-3, 3e-3


class CTRDataConfig(Section):
    path: LocalPath
    """CSV: image_url (a path relative to the file), food_name, food_type, city_name, shop_name, pv_ctr[, impressions, clicks]."""
    eval_path: LocalPath | None = None
    """The same for held-out rows, which are scored once, at the end; unset: `eval_fraction` of the products of `path`."""
    eval_fraction: float = Field(0.1, gt=0, lt=1)
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the products left for training that early stopping is decided on instead; 0: train all epochs on all rows."""
    on_bad_row: Literal["stop", "skip"] = "stop"


class CTRModelSection(Section):
    text: LocalPath | None = None
    """Folder of a text backbone for AutoModel (FEAST's: Chinese-BERT-wwm-ext); unset with `image`: a small pair from scratch."""
    image: LocalPath | None = None
    """Folder of an image backbone for AutoModel (FEAST's: ConvNeXtV2-Huge-22k-512)."""
    image_size: int | None = Field(None, ge=32)
    """Pixels of the square that pictures are padded to; default 512, and 64 for the small pair."""
    max_tokens: int = Field(64, ge=8)

    def conflicts(self) -> Iterator[str]:
        if (self.text is None) != (self.image is None):
            given = f"model.text = {self.text!r} and model.image = {self.image!r}"
            yield f"{given}: give both backbones or neither"


class CTRTrainConfig(Section):
    epochs: int = Field(30, ge=1)
    """Also the length of the cosine of the learning rates; early stopping may end sooner."""
    patience: int = Field(10, ge=1)
    """Epochs without a lower validation loss after which training stops. The best epoch's weights are saved."""
    batch_size: int = Field(32, ge=2)
    """Rows of a batch, over all ranks."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches of an update."""
    loss: Literal["auto", "compound", "binomial"] = "auto"
    """`compound`: FEAST's. `binomial`: clicks of impressions, where the CSV has them. `auto`: binomial if it has."""
    learning_rate: float | None = Field(None, gt=0)
    """Heads; default 1e-3. In the small model everything; default 3e-3."""
    text_learning_rate: float = Field(2e-5, gt=0)
    image_learning_rate: float = Field(5e-6, gt=0)
    freeze: tuple[Literal["text", "image"], ...] = ()
    """Pretrained backbones that are not trained; they stay in eval mode."""
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Literal["bf16", "fp16", "no"] = "no"
    """fp16 scales the loss, and skips an update whose gradients overflow."""
    ranks: int = Field(1, ge=1)
    """Processes that share every batch."""
    num_cpus: float = Field(1.0, ge=0)
    """CPUs of a rank; also its threads."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs of a rank: 1, or 0 to train on the CPU."""
    timeout_s: float = Field(86400.0, gt=0)
    """Deadline of the whole training."""

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"

    def conflicts(self) -> Iterator[str]:
        if self.batch_size % self.ranks:
            shares = f"train.batch_size = {self.batch_size} cannot be shared by train.ranks = {self.ranks}"
            yield f"{shares}; make it a multiple: every rank takes the same number of rows"


class TrainCTRConfig(Section):
    data: CTRDataConfig
    model: CTRModelSection = CTRModelSection()
    train: CTRTrainConfig = CTRTrainConfig()
    output: LocalPath = "runs/ctr"
    """Folder of the checkpoint; judges.ctr.path of the runs that use it. Never overwritten."""
    seed: int = 42
    cluster: ClusterConfig = ClusterConfig()

    def conflicts(self) -> Iterator[str]:
        if self.train.freeze and self.model.text is None:
            yield (
                f"train.freeze = {list(self.train.freeze)} without model.text and model.image: a small model from "
                "scratch has nothing learned to keep; give pretrained backbones or remove train.freeze"
            )
