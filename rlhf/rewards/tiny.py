"""Tiny checkpoints with random weights in the real formats, built without a network: the judges of tests.

They load through exactly the code that loads the real ones (open_clip, vLLM, transformers). A random CLIP's cosine and a random
VLM's verdict are functions of the pixels, no more; the miniature world trains them. Equal seeds give equal weights.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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

_NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
_SPECIAL = {name: f"<|{name}|>" for name in _NAMES}


def write_hpsv2(file: Path, *, seed: int = 0) -> Path:
    """Write an HPSv2-format checkpoint (`{"state_dict": …}`, a .pt) and its model config beside it; returns `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**CLIP_CONFIG)
    torch.save({"state_dict": model.state_dict()}, file)
    file.with_suffix(".json").write_text(json.dumps(CLIP_CONFIG, indent=2))
    return file


def write_qwen3_vl(folder: Path, *, seed: int = 0, least_pixels: int = 32 * 32, texts: Sequence[str] = ()) -> Path:
    """Write a Qwen3-VL folder (config, safetensors, tokenizer, processor, chat template) of ~0.6 M weights.

    vLLM's CPU attention wants heads of at least 32 channels. The weights are drawn wider than usual (0.2) so that the
    verdict's probability depends visibly on the picture. Returns `folder`.

    least_pixels: of a picture; smaller ones are enlarged. texts: what else the tokenizer's pieces are learnt from.
    """
    tokenizer = _build_tokenizer(texts)
    sizes, half = {"shortest_edge": least_pixels, "longest_edge": 256 * 256}, [0.5] * 3
    pictures = transformers.Qwen2VLImageProcessor(patch_size=16, size=sizes, image_mean=half, image_std=half)
    videos = transformers.Qwen3VLVideoProcessor(patch_size=16)
    processor = transformers.Qwen3VLProcessor(pictures, tokenizer, videos, chat_template=CHAT_TEMPLATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen3VLForConditionalGeneration(_qwen3_vl_config(tokenizer)).to(torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _qwen3_vl_config(tokenizer: transformers.Qwen2Tokenizer) -> transformers.Qwen3VLConfig:
    shared = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
    rope = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "max_position_embeddings": 8192}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "rope_parameters": rope}
    places = {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
    vision = {"depth": 2, "num_heads": 2, "out_hidden_size": 64}
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(_SPECIAL[name]) for key, name in tokens.items()}
    return transformers.Qwen3VLConfig(text_config=shared | text | heads, vision_config=shared | vision | places, **ids)


def _build_tokenizer(texts: Sequence[str]) -> transformers.Qwen2Tokenizer:
    """A byte-level BPE trained on the filter's own prompts: every text has an encoding, PASS and FAIL are one token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [SYSTEM_PROMPT, REASON_REQUEST, *VERDICTS * 50, "user\nassistant\nsystem\n", *texts]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return transformers.Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token=_SPECIAL["im_end"],
        pad_token=_SPECIAL["endoftext"],
        additional_special_tokens=list(_SPECIAL.values()),
        model_max_length=8192,
    )
