"""The tables of recipes: frozen, typed, and strict.

A recipe (`jobs.recipes`) puts tables together; a constructor takes the tables that it reads. The defaults are those of FEAST's
`train_dpo_flux_kontext.py`. The tables of training are in `rlhf.training_tables`, those of judges in `rlhf.rewards.config`.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt

from rlhf.names import name_fault
from rlhf.section import LocalPath, Section
from rlhf.types import Fit

Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class RunConfig(Section):
    name: str
    dir: LocalPath = "runs"
    """Folder that holds every run; this one writes to `dir`/`name`/vN. Shared by all nodes."""
    seed: int = Field(42, ge=0)
    resume: str = "auto"
    """`auto`: an unfinished run goes on. `never`: a new vN. RUN/vN/checkpoint_000100: a new vN that goes on from there."""
    save_every: int = Field(100, ge=1)
    """Steps between committed checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Older ones are removed; what is exported stays."""
    export_every: int = Field(0, ge=0)
    """Steps between exports of loadable weights into exports/; 0: only at the end, into final/."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of exported weights: float32 loses nothing that was learnt, the others load at half the size."""
    lora_layouts: tuple[Literal["comfyui", "kohya"], ...] = ()
    """In which an exported LoRA is written too, as final/lora_comfyui.safetensors, beside final/lora for diffusers."""

    def conflicts(self) -> Iterator[str]:
        if fault := name_fault(self.name):
            yield f"name = {self.name!r} {fault}"


class TrackingTable(Section):
    """Where a run's scalars are shown beside metrics.jsonl, which is always written."""

    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    project: str = "diffusion-rlhf"
    """Of wandb."""

    def conflicts(self) -> Iterator[str]:
        if not self.project or set(self.project) & set("/\\#?%:") or len(self.project) > 128:
            yield f"project = {self.project!r}: give a name of up to 128 characters without / \\ # ? % :"


class ModelTable(Section):
    family: str = "flux_kontext"
    """A name of rlhf.models.FAMILIES, or module:NAME of a family of yours, importable on every node."""
    path: LocalPath
    """Folder in the diffusers layout."""
    denoiser: LocalPath | None = None
    """A trained folder in place of the model's own, e.g. RUN/final/unet of an SFT run that DPO is to begin with."""
    accept_index: bool = False
    """Take a folder whose model_index.json names another pipeline: FLUX.1 Dev has Kontext's shapes, and some Kontext copies
    have Dev's index."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What the networks compute in; trained weights stay fp32. float16 trains under a dynamic loss scale."""
    base: Literal["bf16", "fp8", "int8", "nf4", "fp4"] = "bf16"
    """How the frozen linear layers that a LoRA is trained on are kept, in trainer and samplers alike: bf16 as `dtype` says, fp8
    and int8 in half of that, nf4 and fp4 in a quarter. The folder holds plain weights, which are quantised when loaded."""
    guidance_scale: float | None = None
    """Of classifier-free guidance when sampling; a network with embedded guidance is told it in training too. Unset: the
    family's own default."""

    def conflicts(self) -> Iterator[str]:
        if self.base != "bf16" and self.dtype == "float16":
            yield f'base = "{self.base}" has scales that float16 cannot hold: set dtype = "bfloat16"'


class SizedModelTable(ModelTable):
    height: int = Field(ge=16, multiple_of=8)
    """Pixels."""
    width: int = Field(ge=16, multiple_of=8)
    frames: int = Field(1, ge=1)
    """Of a sample; more than 1: a video."""


class EditModelTable(ModelTable):
    height: int = Field(1312, ge=16, multiple_of=16)
    """Pixels."""
    width: int = Field(784, ge=16, multiple_of=16)
    size: Literal["fixed", "auto"] = "fixed"
    """`auto`: the nearest of the family's own sizes per picture."""
    frames: int = Field(1, ge=1)
    """Of a sample; more than 1: a video."""

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        sides = {name: getattr(self, name) for name in ("height", "width")}
        given = [f"{name} = {side}" for name, side in sides.items() if side != type(self).model_fields[name].default]
        if self.size == "auto" and given:
            yield f'size = "auto" takes each picture\'s own size: leave out {" and ".join(given)}'


class EvaluatedModelTable(ModelTable):
    height: int | None = Field(None, ge=16, multiple_of=16)
    """Pixels. Unset, with `width`: the family's own size, for edits the nearest to each source picture."""
    width: int | None = Field(None, ge=16, multiple_of=16)

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if (self.height is None) != (self.width is None):
            yield f"height = {self.height} and width = {self.width}: give both or neither"


class SolverTable(Section):
    steps: int = Field(16, ge=1)
    guidance_scale: float | None = None
    """Unset: model.guidance_scale."""
    negative_prompt: str | None = None
    """What guidance's other branch is told. Unset: nothing, or what the family's examples give for it."""


class SamplingTable(SolverTable):
    batch_size: int = Field(4, ge=1)
    """Pictures per denoising batch. Short ones are padded, so that no bit of a picture depends on its neighbours or their number.
    Its place may change its last bits: with 1 there is one place, and a resumed run repeats an uninterrupted one on any CPU."""


class WeightsTable(Section):
    denoiser: LocalPath | None = None
    """A trained folder, e.g. RUN/final/transformer, RUN/final/ema_unet."""
    lora: LocalPath | None = None
    """A LoRA file or its folder, e.g. RUN/final/lora, or a folder of trained modules, RUN/final/modules."""

    def conflicts(self) -> Iterator[str]:
        if self.denoiser is not None and self.lora is not None:
            yield f"denoiser = {self.denoiser!r} and lora = {self.lora!r}: give one of them"


def _prompt_column(name: str) -> str:
    if name in ("", "image", "image_id"):
        raise ValueError('holds no instruction: name the field of data.path that does, such as "prompt"')
    return name


PromptColumn = Annotated[str, AfterValidator(_prompt_column)]


class DataConfig(Section):
    path: LocalPath
    """JSONL: image_id, prompt, image (a path relative to the file, or a list of them)."""
    item_metadata: LocalPath | None = None
    """CSV: image_id, food_name, food_type, city_name, shop_name. Required where a CTR reward is used."""
    fit: Fit = "crop"
    prompt_column: PromptColumn = "prompt"
    on_bad_row: Literal["stop", "skip"] = "stop"
    cache: LocalPath = "cache"
    """Folder of the content-addressed cache of encodings."""


class BucketsTable(Section):
    """Each example is trained at the bucket whose aspect is nearest to its target's; a batch holds one bucket."""

    areas: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Pixels, at most; unset: model.height × model.width. Of several, every example is trained at each."""
    step: int = Field(64, ge=16, multiple_of=16)
    """Pixels that every side is a multiple of."""
    min_side: int = Field(256, ge=16)
    max_side: int = Field(2048, ge=16)

    def conflicts(self) -> Iterator[str]:
        if self.min_side > self.max_side:
            yield f"min_side = {self.min_side} is above max_side = {self.max_side}"
        for area in self.areas:
            yield from self.unfit(area, "areas")

    def unfit(self, area: int, key: str) -> Iterator[str]:
        """What is wrong with an area that `key` gives."""
        side = math.isqrt(area) // self.step * self.step
        if side < self.min_side:
            least = (-(-self.min_side // self.step) * self.step) ** 2
            yield f"{key} holds {area}, whose square is below min_side = {self.min_side}: give {least} or more, or lower min_side"
        if side > self.max_side:
            yield f"{key} holds {area}, whose square is above max_side = {self.max_side}: raise max_side"


class PairDataConfig(Section):
    path: LocalPath
    """Preference pairs: Parquet or Arrow files in Pick-a-Pic's columns (a file, or a folder as `datasets` or the hub lays it
    out), a JSONL or CSV of winner, loser, prompt[, source][, mask], or the pairs/ folder of an online run. Targets for SFT: any
    of them, a table, JSONL or CSV of target, prompt[, source][, mask], or a folder of training_images/, control_images/."""
    root: LocalPath | None = None
    """Folder that the paths in a JSONL or CSV start from and lie in, of `path` and eval.path. Unset: that of the file."""
    task_weights: dict[str, Weight] = Field({})
    """Makes `path` a folder of data sets and mixes them: how often each one's examples are trained, by the name of its folder.
    Those that are not named are not used."""
    source_count_weights: dict[NonNegativeInt, Weight] = Field({})
    """How often examples of so many sources are trained, within their data set. Empty: as often as there are; those that are not
    named are not used."""
    frame_stride: int = Field(1, ge=1)
    """Of videos every so many-th frame is taken, model.frames of them."""
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
    task_caption_dropout: dict[str, Share] = Field({})
    """The same of data sets that task_weights names, in place of `caption_dropout`."""
    source_dropout: float = Field(0.0, ge=0, le=1)
    """Share of micro-batches that train without their sources, from the caption alone."""
    mask_weight: float = Field(2.0, ge=0)
    """What a latent's squared error is multiplied by where its example has a mask that is white; elsewhere by 1."""
    buckets: BucketsTable | None = None
    """Several sizes, by aspect; unset: model.height × model.width for all."""
    shuffle: bool = True
    """False: the order of the files, epoch after epoch."""
    shuffle_blocks: int = Field(16, ge=1)
    """On the fly: Parquet row groups whose rows are mixed with each other; every encoder holds as many. Cached: all are."""

    def conflicts(self) -> Iterator[str]:
        if self.crop == "random" and self.latents == "cached":
            yield (
                'crop = "random" draws a crop for every visit, but latents = "cached" encodes a picture once; set '
                'latents = "on_the_fly" or crop = "centre"'
            )
        for key in ("task_weights", "source_count_weights"):
            weights = getattr(self, key)
            if weights and not any(weights.values()):
                yield f"{key} = {weights} are all 0, so nothing would be trained"
        if unknown := [name for name in self.task_caption_dropout if name not in self.task_weights]:
            yield f"task_caption_dropout names {unknown[0]!r}, which has no weight in task_weights: name one that has"


class RolloutConfig(Section):
    num_valid_samples: int = Field(2, ge=2)
    max_sample_attempts: int = Field(20, ge=2)
    lookahead: int = Field(0, ge=0)
    """Batches of groups sampled ahead of the trainer. 0 with publish_every 1 is strictly on-policy."""
    publish_every: int = Field(1, ge=1)
    max_age: int | None = None
    """Largest (steps since its policy was published) a pair may have when it trains; default: the smallest that works."""
    max_dropped_in_a_row: int = Field(32, ge=1)
    """Groups in a row without a pair after which the run stops with the counts."""

    @property
    def oldest(self) -> int:
        return self.lookahead + self.publish_every - 1 if self.max_age is None else self.max_age

    def conflicts(self) -> Iterator[str]:
        attempts, valid = self.max_sample_attempts, self.num_valid_samples
        if attempts < valid:
            yield f"max_sample_attempts = {attempts} is below num_valid_samples = {valid}"
        ahead, every, age = self.lookahead, self.publish_every, self.max_age
        if age is not None and age < ahead + every - 1:
            need = f"lookahead + publish_every - 1 = {ahead} + {every} - 1 = {ahead + every - 1}"
            yield f"max_age = {age} is below {need}: every pair would be too old to train on"


class DPOConfig(Section):
    beta: float = Field(5000.0, gt=0)
    reference_refresh_every: int = Field(50, ge=0)
    """Steps between copies of the policy into the reference; 0: never."""


class SamplersConfig(Section):
    count: int = Field(1, ge=1)
    num_cpus: float = Field(0.2, ge=0)
    num_gpus: float = Field(1.0, ge=0)
    timeout_s: float = Field(1800.0, gt=0)
    """Starting, loading weights, and one batch."""


class OnlineSamplersConfig(SamplersConfig):
    max_restarts: int = Field(4, ge=0)
    """Of one sampler, and of the actor that asks the judges; a further failure ends the run."""


class EvalConfig(Section):
    path: LocalPath | None = None
    every: int = Field(50, ge=1)
    seeds: int = Field(1, ge=1)
    max_prompts: int = Field(16, ge=1)


class HeldOutConfig(Section):
    path: LocalPath | None = None
    """Pairs that are never trained on, in any format that data.path may have; unset: no evaluation."""
    split: str = "validation_unique"
    every: int = Field(100, ge=1)
    max_pairs: int = Field(256, ge=1)
    """Of the first so many, as many as fill batches of every rank."""
    draws: int = Field(4, ge=1)
    """(t, noise) draws per pair, always the same ones."""


class ValidationTable(SolverTable):
    """Pictures that are made while a run trains, always of the same prompts and noise."""

    path: LocalPath | None = None
    """JSONL like data.path of jobs.online_dpo: image_id, prompt, and image where the model sees one. Unset: none are made."""
    every: int = Field(100, ge=1)
    """Steps; also before the first."""
    max_prompts: int = Field(4, ge=1, le=8)
    """Of the first so many, which is what a sheet shows."""


class PreprocessConfig(Section):
    encoders: int = Field(1, ge=1)
    """Processes that hold the text encoders and the VAE."""
    batch_size: int = Field(8, ge=1)
    """Encodings computed at once; short batches are padded."""
    num_cpus: float = Field(0.3, ge=0)
    """Of each encoder."""
    num_gpus: float = Field(0.0, ge=0)
    """Of each encoder; 0: on the CPU."""
    timeout_s: float = Field(7200.0, gt=0)
    """All of the encoding before training and, offline, before it all of the check of the pairs."""


class PromptDataTable(Section):
    path: LocalPath
    """JSONL with image_id, prompt and image; where the model sees no source: JSONL with prompt (and image_id), or a .txt
    file with one prompt a line."""
    item_metadata: LocalPath | None = None
    """CSV: image_id, food_name, food_type, city_name, shop_name. Required where a CTR judge is asked."""
    prompt_column: PromptColumn = "prompt"
    fit: Fit = "crop"
    max_prompts: int | None = Field(None, ge=1)
    """Only the first so many."""
    on_bad_row: Literal["stop", "skip"] = "stop"


class EvaluateSamplingTable(SamplingTable):
    seeds: int = Field(1, ge=1)
    """Pictures per prompt, each from noise of its own; base and tuned get the same."""


class TunedTable(WeightsTable):
    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.denoiser is None and self.lora is None:
            yield "give denoiser (a trained folder) or lora (a LoRA)"
