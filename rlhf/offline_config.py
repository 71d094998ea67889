"""The recipe of `jobs.offline_dpo`: learning from preferences that are already there. See `rlhf.tables` for the rest."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf.rewards.config import JudgesConfig, ServeConfig
from rlhf.section import ClusterConfig, LocalPath, Section
from rlhf.tables import DPOConfig, ModelConfig, OnlineDPOConfig, PreprocessConfig, RunConfig, TrainerConfig


class OfflineRunConfig(RunConfig):
    name: str = "offline_dpo"


class OfflineModelConfig(ModelConfig):
    guidance_scale: float | None = None
    """What a network with embedded guidance (Kontext) is told while it trains; unset: the family's own default."""


class PairDataConfig(Section):
    path: LocalPath
    """Preference pairs: Parquet or Arrow files in Pick-a-Pic's columns (a file, or a folder as `datasets` or the hub lays it
    out), a JSONL of winner, loser, prompt[, source], or the pairs/ folder of an online run."""
    split: str = "train"
    """Of a folder with split-00000-of-….parquet files, those to read."""
    item_metadata: LocalPath | None = None
    """CSV: image_id, food_name, food_type, city_name, shop_name; for a choice_model that reads the item of a JSONL's row."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    cache: LocalPath = "cache"
    """Folder of the checked index, of encoded captions and of cached latents."""
    choice_model: str | None = None
    """A judge whose scores decide the winner in place of the human label (AI feedback). Equal scores keep the label."""
    latents: Literal["cached", "on_the_fly"] = "cached"
    """`cached`: every picture is encoded once, before training. `on_the_fly`: encoder actors work beside the trainer."""
    crop: Literal["centre", "random"] = "centre"
    hflip: bool = True
    """Mirror half of the pairs, both pictures (and the source) alike."""
    caption_dropout: float = Field(0.2, ge=0, le=1)
    """Share of pairs that train with the empty caption, which classifier-free guidance needs."""
    shuffle: bool = True
    """False: the order of the files, epoch after epoch."""
    shuffle_blocks: int = Field(16, ge=1)
    """On the fly: Parquet row groups whose rows are mixed with each other; every encoder holds as many. Cached: all are."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.crop == "random" and self.latents == "cached":
            raise ValueError(
                'crop = "random" draws a crop for every visit, but latents = "cached" encodes a picture once; set '
                'latents = "on_the_fly" or crop = "centre"'
            )
        return self


class HeldOutConfig(Section):
    path: LocalPath | None = None
    """Pairs that are never trained on, in any format that data.path may have; unset: no evaluation."""
    split: str = "validation_unique"
    every: int = Field(100, ge=1)
    max_pairs: int = Field(256, ge=1)
    """Of the first so many, as many as fill batches of every rank."""
    draws: int = Field(4, ge=1)
    """(t, noise) draws per pair, always the same ones."""


class OfflineDPO(DPOConfig):
    reference_refresh_every: int = Field(0, ge=0)
    """Steps between copies of the policy into the reference; 0: never, as in the paper."""


class OfflineDPOConfig(Section):
    objective: Literal["dpo", "sft"] = "dpo"
    """`sft` trains on the winners alone, without a reference."""
    run: OfflineRunConfig = OfflineRunConfig()
    model: OfflineModelConfig
    data: PairDataConfig
    eval: HeldOutConfig = HeldOutConfig()
    dpo: OfflineDPO = OfflineDPO()
    trainer: TrainerConfig = TrainerConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    judges: JudgesConfig = JudgesConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def judge_names(self) -> list[str]:
        """The judge that relabels, if one does."""
        return [self.data.choice_model] if self.data.choice_model else []

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        name = self.data.choice_model
        if name:
            problems += self.judges.unusable([name], "data.choice_model")
            if name in self.judges.rewards and self.judges[name].needs_item and self.data.item_metadata is None:
                problems.append(
                    f"data.choice_model = {name!r} needs data.item_metadata: it reads the item of a picture"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self


TrainingConfig = OnlineDPOConfig | OfflineDPOConfig
"""What trains a denoiser: the recipes share `run`, `model`, `data.cache`, `trainer` and `preprocess`."""
