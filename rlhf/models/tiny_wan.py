"""A tiny random Wan folder with references in the real format: see `rlhf.models.tiny`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from rlhf.models.tiny import TEXT_TOKENS, _t5_tokenizer
from rlhf.models.wan_network import with_references

CLIP_WIDTH = 32


def write_wan(folder: Path | str, seed: int = 0, *, texts: Sequence[str] = (), channels: int = 4) -> Path:
    """Write a tiny text-to-video folder, as `WanPipeline` saves it, and return its path. texts: whose words are tokens."""
    folder, tokenizer = Path(folder), _t5_tokenizer(texts)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(
                UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
            ),
            vae=AutoencoderKLWan(
                base_dim=8,
                z_dim=channels,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=torch.randn(channels, generator=generator).div(4).tolist(),
                latents_std=torch.rand(channels, generator=generator).add(0.5).tolist(),
            ),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
            ),
            transformer=WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=channels,
                out_channels=channels,
                text_dim=32,
                freq_dim=32,
                ffn_dim=48,
                num_layers=2,
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


def write_clip(folder: Path, seed: int = 0) -> Path:
    """Write a tiny image_encoder/ and image_processor/ into a folder."""
    config = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPVisionModel(config).save_pretrained(folder / "image_encoder")
    side = {"height": 28, "width": 28}
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=side).save_pretrained(folder / "image_processor")
    return folder


def write_wan_subject(folder: Path | str, seed: int = 0, *, fused: bool = False, texts: Sequence[str] = ()) -> Path:
    """Write a tiny Wan folder with references, its new layers at their start, and return its path."""
    folder = write_clip(write_wan(folder, seed, texts=texts), seed)
    base = WanTransformer3DModel.from_pretrained(folder / "transformer")
    network = with_references(base, clip_dim=CLIP_WIDTH, text_len=TEXT_TOKENS, fused=fused, seed=seed)
    network.save_pretrained(folder / "transformer")
    return folder
