"""A CTR model small enough to train from scratch on a CPU in minutes: a tiny BERT, a tiny ResNet and a wide part.

A ResNet and not a small ConvNeXtV2, because the layer norms of the latter remove brightness and contrast, on which clicks
depend, and a thousand pictures are too few to learn them back. The architecture around the backbones, the
checkpoint format and the loading code are those of the published ones.

The tokenizer's tokens are whole words with their field ("店铺:老王小铺"): from a few hundred products a model learns the
click rate of a shop, not what its characters mean together. Left out: subwords.
"""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast, ResNetConfig

from rlhf.rewards.ctr.model import CTRModelConfig

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def small_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per word (between spaces) that two of the distinct `texts` have; others are spelled in characters.

    Lower case; BERT's special tokens first, then sorted, so that equal texts give equal ids.
    """
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    count = Counter(word for text in set(texts) for word in set(normalizer.normalize_str(text).split()))
    words = sorted(word for word in count if count[word] > 1)
    characters = sorted({character for word in count for character in word})
    pieces = [*_SPECIAL, *characters, *(f"##{character}" for character in characters), *words]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
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
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
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
        filters=16,
    )
