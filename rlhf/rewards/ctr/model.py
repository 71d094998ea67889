"""Click-through-rate model: a picture and the product on it → the predicted share of views that click.

The architecture is that of FEAST's CTR model: item text through a BERT, picture through a ConvNeXtV2, each projected to width
256, the two tokens with modality embeddings through a small transformer, concatenated → one number. The backbones are whatever
`AutoModel` loads, so the published Chinese-BERT-wwm-ext + ConvNeXtV2-Huge-22k-512 and a small pair trained from scratch
on a CPU are one code path.

With `filters` the network is wide and deep (Cheng et al. 2016, arXiv:1606.07792): beside the deep logit stands a linear
one of the text's tokens and of mean and deviation of learned filters over the picture. The linear part is learned from a
thousand rows, where the deep part needs far more. The small model has it, FEAST's does not.

A checkpoint is a folder: `config.json` (`CTRModelConfig`), `model.safetensors`, `tokenizer/`. The output goes through a
sigmoid, so that it is a rate whatever the loss.

Left out: training (`jobs.train_ctr`) and everything about products beyond the four text fields.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from rlhf.errors import Refused
from rlhf.rewards.config import CTRJudgeConfig
from rlhf.rewards.features import forward_rows, letterbox
from rlhf.rewards.protocols import Items, Media, Reward, Sources, check_columns, picture_of, quick_fingerprint
from rlhf.shards.files import SafetensorsFolder, read_json, refuse_broken
from rlhf.types import Item

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLICKED_WEIGHT = 10.0
"""What a row that was clicked counts in the compound loss; one that was not counts 1."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """The four columns of an item that the model reads. Rows of a click log with equal ones show the same product."""

    food_name: str
    food_type: str
    city_name: str
    shop_name: str

    @classmethod
    def of(cls, item: Item) -> Self:
        """The product of an item, whose other columns are not read. Raises: Refused, naming the columns that it lacks."""
        columns = CTRJudgeConfig.item_columns
        check_columns("ctr", columns, item)
        return cls(**{column: item[column] for column in columns})


class CTRModelConfig(BaseModel):
    """Shape of a CTR model. `text` and `image` are transformers configs as dicts, with their `model_type`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: dict[str, Any]
    image: dict[str, Any]
    image_size: int = 512
    max_tokens: int = 64
    hidden: int = 512
    width: int = 256
    layers: int = 4
    heads: int = 4
    dropout: float = 0.2
    filters: int = 0
    """Learned filters of the wide part; 0: none, as in FEAST's model."""


class CTRModel(nn.Module):
    """pixels (B, 3, S, S), token ids and mask (B, L) → logits (B,) of the click rate."""

    def __init__(self, config: CTRModelConfig) -> None:
        super().__init__()
        self.config = config
        self.text = AutoModel.from_config(AutoConfig.for_model(**config.text))
        self.image = AutoModel.from_config(AutoConfig.for_model(**config.image))
        self.text_projection = self._projection(self.text.config.hidden_size)
        self.wide = Wide(self.text.config.vocab_size, config.filters) if config.filters else None
        self.image_projection = self._projection(self.image.config.hidden_sizes[-1] + 2 * config.filters)
        self.modality = nn.Parameter(torch.randn(2, config.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, config.dropout, activation="gelu", batch_first=True
        )
        self.fusion = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.head = nn.Sequential(
            nn.Linear(2 * config.width, 128), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(128, 1)
        )

    def _projection(self, features: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in ((features, self.config.hidden), (self.config.hidden, self.config.width)):
            layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.GELU(), nn.Dropout(self.config.dropout)]
        return nn.Sequential(*layers)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        text = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        image = self.image(pixel_values=pixels).pooler_output.flatten(1)
        wide: Tensor | float = 0.0
        if self.wide is not None:
            wide, statistics = self.wide(pixels, input_ids, attention_mask)
            image = torch.cat([image, statistics], dim=1)
        tokens = torch.stack([self.text_projection(text), self.image_projection(image)], dim=1) + self.modality
        return self.head(self.fusion(tokens).flatten(1))[:, 0] + wide


class Wide(nn.Module):
    """The linear part: a weight per token, and one per statistic of learned filters.

    Nothing is normalised here: the norms of the deep part remove brightness, colour and contrast, on which clicks depend.
    """

    def __init__(self, vocabulary: int, filters: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, 1)
        self.filters = nn.Conv2d(3, filters, kernel_size=3, stride=2)
        self.statistics = nn.Linear(2 * filters, 1, bias=False)  # the deep head has the bias
        nn.init.zeros_(self.words.weight)
        nn.init.zeros_(self.statistics.weight)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) to add to the logit, and (B, 2·filters) mean and deviation of each filter over the picture."""
        variance, mean = torch.var_mean(self.filters(pixels).float(), dim=(2, 3), correction=0)
        statistics = torch.cat([mean, (variance + 1e-4).sqrt()], dim=1).to(self.statistics.weight.dtype)
        words = (self.words(input_ids)[..., 0] * attention_mask).sum(1)
        return words + self.statistics(statistics)[:, 0], statistics


class CTRReward(Reward):
    """The `Reward` "ctr": predicted click rate in (0, 1). Needs a product for every picture; prompts are not read."""

    def __init__(self, name: str, judge: CTRJudgeConfig, device: str) -> None:
        """judge.path: a folder written by `save`."""
        folder = Path(str(judge.path))
        model, self.tokenizer = load(folder)
        self.name, self.device, self.version = name, device, f"{folder.name}@{quick_fingerprint(folder)}"
        self.rows, self.dtype = judge.padded_rows, getattr(torch, judge.dtype)
        self.model = model.to(device=device, dtype=self.dtype).eval().requires_grad_(False)

    @classmethod
    def check(cls, key: str, judge: CTRJudgeConfig) -> None:
        check(Path(str(judge.path)))

    @torch.inference_mode()
    def _scores(self, media: Media, prompts: Sequence[str], sources: Sequence[Sources], items: Items) -> list[float]:
        """Predicted click rate per picture; Refused where a column of an item is missing."""
        products = [Product.of(item) for item in items]
        pixels = torch.stack([transform(picture_of(medium), self.model.config.image_size) for medium in media])
        ids, mask = encode_items(self.tokenizer, products, self.model.config.max_tokens)
        return forward_rows(self._rates, self.rows, pixels, ids, mask).tolist()

    def _rates(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self.model(pixels.to(self.device, self.dtype), ids.to(self.device), mask.to(self.device))
        return torch.sigmoid(logits.float())


def describe(product: Product) -> str:
    """The text of a product that the text backbone reads, as FEAST's CTR model has it."""
    return f"菜品:{product.food_name} 类型:{product.food_type} 城市:{product.city_name} 店铺:{product.shop_name}"


def encode_items(
    tokenizer: PreTrainedTokenizerBase, products: Sequence[Product], max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, max_tokens) int64: one length always, so that batches cannot differ."""
    texts = [describe(product) for product in products]
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def transform(image: np.ndarray, size: int) -> Tensor:
    """FEAST's transform of one uint8 (H, W, 3): longest side to `size`, white padding; fp32 (3, size, size)."""
    return letterbox(image, size, InterpolationMode.BILINEAR, fill=1.0, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def compound_loss(predicted: Tensor, rate: Tensor) -> Tensor:
    """FEAST's loss over a batch of rates (B,): Σ w(ŷ−y)²/B + 0.1·(Var ŷ − Var y)² + 0.01·KL(softmax ŷ ‖ softmax y).

    w = CLICKED_WEIGHT where y > 0, else 1; Var is the population variance, so that it is defined for B = 1.
    """
    squares = weighted_squares(predicted, rate).mean()
    spread = (predicted.var(unbiased=False) - rate.var(unbiased=False)).square()
    log_p, log_q = F.log_softmax(predicted, dim=0), F.log_softmax(rate, dim=0)
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    return squares + 0.1 * spread + 0.01 * divergence


def weighted_squares(predicted: Tensor, rate: Tensor) -> Tensor:
    """w(ŷ−y)² of each row (B,)."""
    return torch.where(rate > 0, CLICKED_WEIGHT, 1.0) * (predicted - rate).square()


def binomial_loss(logits: Tensor, rate: Tensor, impressions: Tensor, total: Tensor | float | None = None) -> Tensor:
    """Negative log-likelihood per impression of clicks ~ Binomial(impressions, σ(logit)); rate = clicks/impressions.

    A rate of 2,000 views counts a hundred times as much as one of 20. All (B,); the binomial coefficient is constant.
    `total`: impressions to divide by where these rows are a part of a larger batch; the parts then add up.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, rate, reduction="none")
    return (impressions * entropy).sum() / (impressions.sum() if total is None else total)


def save(folder: Path, model: CTRModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write a checkpoint folder that `load` reads; weights in fp32 on the CPU. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_text(model.config.model_dump_json(indent=2))
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in _floating(model).items()}
    save_file(state, folder / "model.safetensors")
    return folder


def load(folder: Path) -> tuple[CTRModel, PreTrainedTokenizerBase]:
    """A CTR model (fp32, CPU) and its tokenizer. Raises: Refused, naming what is wrong."""
    config, tokenizer = check(folder)
    model = CTRModel(config)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model, tokenizer


def check(folder: Path) -> tuple[CTRModelConfig, PreTrainedTokenizerBase]:
    """What a checkpoint says it is, and its tokenizer, after a look at its weights' header. Raises: Refused."""
    for name in ("config.json", "model.safetensors", "tokenizer"):
        if not (folder / name).exists():
            raise Refused(f"{folder} is no CTR checkpoint: {name} is missing; make one with jobs.train_ctr")
    file, stored = folder / "model.safetensors", SafetensorsFolder(folder / "model.safetensors").where
    refuse_broken(folder / "tokenizer")
    try:
        config = CTRModelConfig.model_validate(read_json(folder / "config.json"))
        with torch.device("meta"):
            model = CTRModel(config)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise Refused(f"{folder} is no CTR checkpoint: {error}; make one with jobs.train_ctr") from error
    state = model.state_dict()
    missing, unknown = sorted(_floating(model).keys() - stored.keys()), sorted(stored.keys() - state.keys())
    other = [name for name in state.keys() & stored.keys() if list(state[name].shape) != stored[name].shape]
    if missing or unknown or other:
        what = f"missing {missing}, unknown {unknown}, of another shape {sorted(other)}"
        raise Refused(f"{file} does not fit its config: {what}; make one with jobs.train_ctr")
    return config, tokenizer


def _floating(model: CTRModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
