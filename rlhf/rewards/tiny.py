"""Tiny checkpoints with random weights in the real formats, built without a network: the judges' test and demo models.

They load through exactly the code that loads the real ones (open_clip, vLLM, transformers) and mean nothing: a random
CLIP's cosine and a random VLM's verdict are functions of the pixels, no more. Equal seeds give equal weights.
"""

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from rlhf.rewards.aesthetic import AestheticHead
from rlhf.rewards.filters import REASON_REQUEST, SYSTEM_PROMPT, VERDICTS

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen3-VL's own layout of a conversation, without its tool calls."""

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def write_hpsv2(file: Path, *, seed: int = 0) -> Path:
    """Write an HPSv2-format checkpoint (`{"state_dict": …}`, a .pt) and its model config beside it; returns `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**CLIP_CONFIG)
    torch.save({"state_dict": model.state_dict()}, file)
    file.with_suffix(".json").write_text(json.dumps(CLIP_CONFIG, indent=2))
    return file


def write_clip(folder: Path, *, seed: int = 0) -> Path:
    """Write a CLIPModel folder (config, safetensors, tokenizer, processor) of ~0.2 M weights; returns `folder`.

    The tokenizer is CLIP's with a vocabulary of single bytes, so every text has an encoding, of a token per byte. The
    weights are drawn wider than usual so that a score depends visibly on picture and prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=77)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    last = len(tokens) - 1
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_factor": 5.0}
    config = CLIPConfig(
        text_config=shape
        | {"vocab_size": len(tokens), "hidden_size": 32, "intermediate_size": 64}
        | {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last},
        vision_config=shape | {"hidden_size": 64, "intermediate_size": 128, "image_size": 64, "patch_size": 8},
        projection_dim=32,
        logit_scale_init_value=math.log(100),  # what CLIPs, PickScore too, are trained to
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
    model.save_pretrained(folder)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def write_aesthetic_head(file: Path, *, width: int = 32, seed: int = 0) -> Path:
    """Write an aesthetic predictor (a .pth in the published layout) for features of `width`; returns `file`.

    Drawn so that no layer shrinks what it is given: the score depends visibly on the picture.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    head = AestheticHead(width)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(value.shape, generator=generator) / math.sqrt(value.shape[-1])
        for name, value in head.state_dict().items()
    }
    torch.save(state, file)
    return file


def write_qwen3_vl(folder: Path, *, seed: int = 0) -> Path:
    """Write a Qwen3-VL folder (config, safetensors, tokenizer, processor, chat template) of ~0.2 M weights.

    vLLM's CPU attention wants heads of at least 32 channels. The weights are drawn wider than usual (0.2) so that the
    verdict's probability depends visibly on the picture. Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _build_tokenizer()
    image_processor = Qwen2VLImageProcessor(
        patch_size=16,
        merge_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    video_processor = Qwen3VLVideoProcessor(patch_size=16, merge_size=2)
    processor = Qwen3VLProcessor(image_processor, tokenizer, video_processor, chat_template=CHAT_TEMPLATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(_qwen3_vl_config(tokenizer)).to(torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _qwen3_vl_config(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIAL}
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 8192,
            "initializer_range": 0.2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": 16,
            "out_hidden_size": 64,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def _build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE trained on the filter's own prompts: every text has an encoding, PASS and FAIL are one token."""
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [SYSTEM_PROMPT, REASON_REQUEST, *VERDICTS * 50, "user\nassistant\nsystem\n"]
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    qwen = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(_SPECIAL),
        model_max_length=8192,
    )
    return qwen
