"""Tiny random checkpoints in the real formats: the whole system runs on them where no model hub can be reached.

`write_flux_kontext` saves a complete `FluxKontextPipeline` folder (transformer, VAE, CLIP, T5, tokenizers, scheduler),
`write_stable_diffusion` one of `StableDiffusionPipeline` or `StableDiffusionXLPipeline`, that the real loading code and
diffusers itself open. Weights are random but deterministic in `seed`.
"""

import json
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT_TOKENS = 24


def _clip_tokenizer(texts: Sequence[str] = (), tokens: int = TEXT_TOKENS) -> CLIPTokenizer:
    """Characters, and the words of `texts`."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([text for text in texts if text.isascii()], trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    words += [first + second for first, second in merges]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=tokens)


def _t5_tokenizer(texts: Sequence[str] = (), tokens: int = TEXT_TOKENS) -> T5Tokenizer:
    """Latin letters, and the words of `texts`: like the real T5 it knows no Chinese."""
    letters = string.ascii_letters + string.digits + string.punctuation
    words = {word.strip(string.punctuation) for text in texts if text.isascii() for word in text.split()}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    pieces += [(f"▁{word}", -1.0) for word in sorted(words)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=tokens)


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_dim=32,
    )


def _vae(channels: int, **settings: float | bool) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        **settings,
    )


def transformer_config(
    *, layers: int = 2, single_layers: int = 2, heads: int = 2, head_dim: int = 16, channels: int = 4
) -> dict:
    """Arguments of a small `FluxTransformer2DModel`; `head_dim` must be a multiple of 16: RoPE rotates pairs of channels."""
    return dict(
        patch_size=1,
        in_channels=4 * channels,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8),
    )


def write_flux_kontext(
    folder: Path | str,
    seed: int = 0,
    *,
    vae: AutoencoderKL | None = None,
    texts: Sequence[str] = (),
    tokens: int = TEXT_TOKENS,
    **transformer: int,
) -> Path:
    """Write a tiny Kontext folder and return its path.

    vae: default a random one. texts: whose words are tokens; others are spelled in letters. tokens: of an instruction, at most.
    Other keyword arguments go to `transformer_config`.
    """
    folder = Path(folder)
    config = transformer_config(**transformer)
    channels = config["in_channels"] // 4
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(texts, tokens), _t5_tokenizer(texts, tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FluxKontextPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            transformer=FluxTransformer2DModel(**config),
            vae=vae
            or _vae(
                channels, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False
            ),
            text_encoder=CLIPTextModel(_clip_config(clip_tokenizer)),
            tokenizer=clip_tokenizer,
            text_encoder_2=T5EncoderModel(
                T5Config(vocab_size=len(t5_tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
            ),
            tokenizer_2=t5_tokenizer,
        )
    pipeline.save_pretrained(folder)
    return folder


def write_stable_diffusion(
    folder: Path | str, *, xl: bool = False, prediction_type: str = "epsilon", seed: int = 0
) -> Path:
    """Write a tiny Stable Diffusion 1.5 or XL folder, with the scheduler of the real one, and return its path."""
    folder = Path(folder)
    tokenizer = _clip_tokenizer()
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        common = dict(
            unet=UNet2DConditionModel(**unet_config(xl=xl)),
            text_encoder=CLIPTextModel(_clip_config(tokenizer)),
            tokenizer=tokenizer,
        )
        if xl:
            pipeline = StableDiffusionXLPipeline(
                **common,
                scheduler=EulerDiscreteScheduler(**betas, timestep_spacing="leading", prediction_type=prediction_type),
                vae=_vae(4, scaling_factor=0.13025, force_upcast=True),
                text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer)),
                tokenizer_2=_clip_tokenizer(),
            )
        else:
            pipeline = StableDiffusionPipeline(
                **common,
                scheduler=PNDMScheduler(**betas, skip_prk_steps=True, prediction_type=prediction_type),
                vae=_vae(4, scaling_factor=0.18215, force_upcast=False),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
    pipeline.save_pretrained(folder)
    return folder


def unet_config(*, xl: bool) -> dict:
    """Arguments of a small `UNet2DConditionModel` for the tiny text encoders; as in the real ones, attention is at the
    upper level of 1.5 and at the lower of XL, which also takes pooled text (32) and six picture sizes."""
    added = dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    return dict(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D") if xl else ("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D") if xl else ("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64 if xl else 32,
        attention_head_dim=(2, 4) if xl else 4,
        **(added if xl else {}),
    )
