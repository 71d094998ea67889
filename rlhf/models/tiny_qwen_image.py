"""Tiny random Qwen-Image folders in the real format: see `rlhf.models.tiny`.

The tokenizer knows the words of the models' own prompts, each as one token like the real one's, so that what stands before an
instruction has the lengths that diffusers' pipelines count on: 34 tokens, 64 with sources.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from rlhf.models.qwen_prompts import EDIT, END, PAINT

MARKS = ("im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
WORDS = 2_000
"""Tokens at most, beside bytes and marks."""
Pipeline = Literal["QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"]


def _tokenizer(texts: Sequence[str]) -> Qwen2Tokenizer:
    """Bytes, the words of the models' own prompts, and those of `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    marks = {f"<|{mark}|>" for mark in MARKS}
    own = "".join((PAINT, EDIT, END, "Picture 1: 2: 3: "))
    for mark in marks:
        own = own.replace(mark, "\n\n\n")
    bpe.train_from_iterator([*own.split("\n\n\n"), *texts], trainer)
    found = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=found["vocab"] | {"<|endoftext|>": len(found["vocab"])},
        merges=[tuple(merge) for merge in found["merges"]],
        additional_special_tokens=[f"<|{mark}|>" for mark in MARKS],
    )


def _reader_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    def token(mark: str) -> int:
        return tokenizer.convert_tokens_to_ids(f"<|{mark}|>")

    text = dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=token("im_end"),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2]),
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        num_heads=2,
        intermediate_size=64,
        patch_size=14,
        window_size=112,
        out_hidden_size=32,
        fullatt_block_indexes=[1],
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("image_pad"),
        video_token_id=token("video_pad"),
        vision_start_token_id=token("vision_start"),
        vision_end_token_id=token("vision_end"),
    )


def write_qwen_image_edit(
    folder: Path | str,
    seed: int = 0,
    *,
    pipeline: Pipeline = "QwenImageEditPlusPipeline",
    vae: AutoencoderKLQwenImage | None = None,
    texts: Sequence[str] = (),
    channels: int = 4,
    **transformer: Any,
) -> Path:
    """Write a tiny folder of one of diffusers' pipelines and return its path.

    vae: default a random one with so many `channels` of latents. texts: whose words are tokens; others are spelled in bytes.
    Other keyword arguments go to `QwenImageTransformer2DModel`.
    """
    folder, tokenizer = Path(folder), _tokenizer(texts)
    generator = torch.Generator().manual_seed(seed)
    config = dict(
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = dict(
            scheduler=FlowMatchEulerDiscreteScheduler(
                base_image_seq_len=256,
                base_shift=0.5,
                max_image_seq_len=8192,
                max_shift=0.9,
                shift=1.0,
                shift_terminal=0.02,
                use_dynamic_shifting=True,
            ),
            vae=vae
            or AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=channels,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=torch.randn(channels, generator=generator).div(4).tolist(),
                latents_std=torch.rand(channels, generator=generator).add(0.5).tolist(),
            ),
            text_encoder=Qwen2_5_VLForConditionalGeneration(_reader_config(tokenizer)),
            tokenizer=tokenizer,
            transformer=QwenImageTransformer2DModel(**config | transformer),
        )
    if pipeline != "QwenImagePipeline":
        parts["processor"] = Qwen2VLProcessor(
            image_processor=Qwen2VLImageProcessor(min_pixels=56**2, max_pixels=28**2 * 16384),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(),
            chat_template="{{ messages }}",
        )
    getattr(diffusers, pipeline)(**parts).save_pretrained(folder)
    return folder
