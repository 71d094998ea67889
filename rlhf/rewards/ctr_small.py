"""A CTR model small enough to train from scratch on a CPU in minutes: a tiny BERT and a tiny ResNet.

A ResNet and not a small ConvNeXtV2, because the layer norms of the latter hide brightness and contrast, which clicks
depend on, and a thousand pictures do not teach it to find them again. The architecture around the backbones, the
checkpoint format and the loading code are those of the published ones. The tokenizer is a character vocabulary taken
from the training texts, as Chinese BERT's is in effect.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast, ResNetConfig

from rlhf.rewards.ctr import CTRModelConfig

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def small_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per character seen in `texts` (sorted, so equal texts give equal ids), BERT's special tokens first."""
    characters = sorted({character for text in texts for character in text.lower() if not character.isspace()})
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", behavior="isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def small_config(tokenizer: PreTrainedTokenizerFast, *, image_size: int = 64, max_tokens: int = 64) -> CTRModelConfig:
    """The small model for this vocabulary."""
    text = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=max_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    image = ResNetConfig(embedding_size=24, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
    return CTRModelConfig(
        text={"model_type": "bert"} | text.to_diff_dict(),
        image={"model_type": "resnet"} | image.to_diff_dict(),
        image_size=image_size,
        max_tokens=max_tokens,
        hidden=128,
        width=64,
        layers=2,
        heads=4,
        dropout=0.1,
    )
