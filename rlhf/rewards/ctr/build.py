"""An untrained CTR model from its section of a recipe, and which of its parameters learn at which rate.

Without backbones it is small enough to train from scratch on a CPU in minutes: a tiny BERT, a tiny ResNet and a wide part. A
ResNet and not a small ConvNeXtV2, because the layer norms of the latter remove brightness and contrast, on which clicks
depend, and a thousand pictures are too few to learn them back. The architecture around the backbones, the checkpoint format
and the loading code are those of the published ones.

The small tokenizer's tokens are whole words with their field ("店铺:老王小铺"): from a few hundred products a model learns the
click rate of a shop, not what its characters mean together. Left out: subwords.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from rlhf.errors import Refused
from rlhf.rewards.ctr.clicks import Click
from rlhf.rewards.ctr.config import LEARNING_RATE, SMALL_LEARNING_RATE, CTRModelSection, CTRTrainConfig
from rlhf.rewards.ctr.model import CTRModel, CTRModelConfig, describe
from rlhf.shards.files import TRANSFORMERS, SafetensorsFolder, read_json, refuse_broken, refuse_pointer, weight_files

_SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def create(clicks: Sequence[Click], section: CTRModelSection) -> tuple[CTRModel, transformers.PreTrainedTokenizerBase]:
    """An untrained CTR model over the configured backbones, its output bias at the mean click rate of `clicks`."""
    if section.text is None or section.image is None:
        tokenizer: transformers.PreTrainedTokenizerBase = small_tokenizer(describe(click.item) for click in clicks)
        model = CTRModel(small_config(tokenizer, image_size=section.image_size or 64, max_tokens=section.max_tokens))
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(section.text)
        config = CTRModelConfig(
            text=transformers.AutoConfig.from_pretrained(section.text).to_dict(),
            image=transformers.AutoConfig.from_pretrained(section.image).to_dict(),
            image_size=section.image_size or 512,
            max_tokens=section.max_tokens,
        )
        model = CTRModel(config)
        model.text.load_state_dict(transformers.AutoModel.from_pretrained(section.text).state_dict())
        model.image.load_state_dict(transformers.AutoModel.from_pretrained(section.image).state_dict())
    mean = min(max(float(np.mean([click.rate for click in clicks])), 1e-4), 1 - 1e-4)
    torch.nn.init.constant_(model.head[-1].bias, math.log(mean / (1 - mean)))
    return model, tokenizer


def check_backbones(section: CTRModelSection) -> None:
    """Raise Refused where a folder that is named is none of a model that transformers reads. Reads no weights."""
    for key in ("text", "image") if section.text is not None else ():
        folder = Path(getattr(section, key))
        try:
            read_json(folder / "config.json")
            refuse_broken(folder)
            if (binary := folder / "pytorch_model.bin").is_file() and not weight_files(folder, TRANSFORMERS)[0]:
                refuse_pointer(binary)
            else:
                SafetensorsFolder(folder, TRANSFORMERS)
        except Refused as error:
            raise Refused(f"model.{key} = {str(folder)!r}: {error}") from error


def parameter_groups(model: CTRModel, section: CTRModelSection, config: CTRTrainConfig) -> list[dict]:
    """Heads, text, image, each at its own rate (by default FEAST's); a small model from scratch all at the heads'.

    The rate is also `initial_lr`, which a schedule scales. Frozen parameters are in no group.
    """
    heads = [parameter for name, parameter in model.named_parameters() if not name.startswith(("text.", "image."))]
    parts = [heads, model.text.parameters(), model.image.parameters()]
    rates = [config.learning_rate or LEARNING_RATE, config.text_learning_rate, config.image_learning_rate]
    if section.text is None:
        rates = [config.learning_rate or SMALL_LEARNING_RATE] * 3
    return [
        {"params": [p for p in part if p.requires_grad], "lr": rate, "initial_lr": rate}
        for part, rate in zip(parts, rates, strict=True)
    ]


def small_tokenizer(texts: Iterable[str]) -> transformers.PreTrainedTokenizerFast:
    """One token per word (between spaces) that two of the distinct `texts` have; others are spelled in characters.

    Lower case; BERT's special tokens first, then sorted, so that equal texts give equal ids.
    """
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    count = Counter(word for text in set(texts) for word in set(normalizer.normalize_str(text).split()))
    words = sorted(word for word in count if count[word] > 1)
    characters = sorted({character for word in count for character in word})
    pieces = [*_SPECIAL.values(), *characters, *(f"##{character}" for character in characters), *words]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)


def small_config(
    tokenizer: transformers.PreTrainedTokenizerFast, *, image_size: int = 64, max_tokens: int = 64
) -> CTRModelConfig:
    """The small model for this vocabulary."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    words = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    text = transformers.BertConfig(max_position_embeddings=max_tokens, **shape, **words)
    image = transformers.ResNetConfig(
        embedding_size=24, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic"
    )
    fusion = {"hidden": 128, "width": 64, "layers": 2, "heads": 4}
    return CTRModelConfig(
        text={"model_type": "bert"} | text.to_diff_dict(),
        image={"model_type": "resnet"} | image.to_diff_dict(),
        image_size=image_size,
        max_tokens=max_tokens,
        dropout=0.1,
        filters=16,
        **fusion,
    )
