"""What `jobs.train_ctr` reads: the click log, the backbones, and how to train."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf.section import ClusterConfig, LocalPath, Section


class CTRDataConfig(Section):
    path: LocalPath
    """CSV: image_url (a path relative to the file), food_name, food_type, city_name, shop_name, pv_ctr[, impressions, clicks]."""
    eval_path: LocalPath | None = None
    """The same for held-out rows; unset: `eval_fraction` of the pictures of `path` are held out."""
    eval_fraction: float = Field(0.1, gt=0, lt=1)
    on_bad_row: Literal["stop", "skip"] = "stop"


class CTRModelSection(Section):
    text: LocalPath | None = None
    """Folder of a text backbone for AutoModel (the seed: Chinese-BERT-wwm-ext); unset with `image`: a small pair from scratch."""
    image: LocalPath | None = None
    """Folder of an image backbone for AutoModel (the seed: ConvNeXtV2-Huge-22k-512)."""
    image_size: int | None = Field(None, ge=32)
    """Pixels of the square that pictures are padded to; default 512, and 64 for the small pair."""
    max_tokens: int = Field(64, ge=8)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.text is None) != (self.image is None):
            raise ValueError(
                f"model.text = {self.text!r} and model.image = {self.image!r}: give both backbones or neither"
            )
        return self


class CTRTrainConfig(Section):
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(32, ge=2)
    gradient_accumulation_steps: int = Field(1, ge=1)
    loss: Literal["auto", "compound", "binomial"] = "auto"
    """`compound`: the seed's. `binomial`: clicks of impressions, where the CSV has them. `auto`: binomial if it has."""
    learning_rate: float = Field(1e-3, gt=0)
    """Heads, and everything in the small model."""
    text_learning_rate: float = Field(2e-5, gt=0)
    image_learning_rate: float = Field(5e-6, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Literal["bf16", "no"] = "no"
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    timeout_s: float = Field(86400.0, gt=0)


class TrainCTRConfig(Section):
    data: CTRDataConfig
    model: CTRModelSection = CTRModelSection()
    train: CTRTrainConfig = CTRTrainConfig()
    output: LocalPath = "runs/ctr"
    """Folder of the checkpoint; judges.ctr.path of the runs that use it. Never overwritten."""
    seed: int = 42
    cluster: ClusterConfig = ClusterConfig()
