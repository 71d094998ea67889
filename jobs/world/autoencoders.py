"""The VAEs of the miniature worlds' families, small, as their training in `jobs.world.vae` sees them.

B pictures, H W pixels, C latent channels (16), h w latents (H/8, W/8).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageResample
from torch import Tensor, nn

LATENTS = 16


class Level(NamedTuple):
    """What a coder does at one size."""

    resnets: Sequence[nn.Module]
    resize: nn.Module | None
    """In an encoder the convolution that halves the size, in a decoder the one behind the doubling; None: the size stays."""


class Coder(NamedTuple):
    """An encoder or a decoder, in the order in which it runs. Its middle block is left out."""

    conv_in: nn.Module
    levels: tuple[Level, ...]
    conv_out: nn.Module


class Autoencoder(Protocol):
    """A VAE of pictures. Latents are those of the model itself: mean and deviation follow from them."""

    model: Any

    @property
    def encoder(self) -> Coder: ...

    @property
    def decoder(self) -> Coder: ...

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents (B, C, h, w) of pictures (B, 3, H, W) in −1 … 1: the posterior's mode."""
        ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def standardise(self, latents: Tensor) -> None:
        """Let the config say which mean and deviation latents like these have."""
        ...


class FluxVAE:
    """FLUX's: diffusers' `AutoencoderKL`."""

    def __init__(self, folder: Path | None = None):
        """folder: of a trained one; None: untrained."""
        self.model = AutoencoderKL.from_pretrained(folder) if folder else self._untrained()

    @staticmethod
    def _untrained() -> AutoencoderKL:
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 24, 48, 64),
            layers_per_block=1,
            latent_channels=LATENTS,
            norm_num_groups=1,
            shift_factor=0.0,
            scaling_factor=1.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )

    @property
    def encoder(self) -> Coder:
        coder = self.model.encoder
        levels = [Level(b.resnets, b.downsamplers[0].conv if b.downsamplers else None) for b in coder.down_blocks]
        return Coder(coder.conv_in, tuple(levels), coder.conv_out)

    @property
    def decoder(self) -> Coder:
        coder = self.model.decoder
        levels = [Level(b.resnets, b.upsamplers[0].conv if b.upsamplers else None) for b in coder.up_blocks]
        return Coder(coder.conv_in, tuple(levels), coder.conv_out)

    def encode(self, pictures: Tensor) -> Tensor:
        return self.model.encode(pictures).latent_dist.mode()

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).sample

    def standardise(self, latents: Tensor) -> None:
        self.model.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


class QwenVAE:
    """Qwen-Image's: diffusers' `AutoencoderKLQwenImage`, made for films, with a picture as one frame."""

    def __init__(self, folder: Path | None = None):
        """folder: of a trained one; None: untrained."""
        self.model = AutoencoderKLQwenImage.from_pretrained(folder) if folder else self._untrained()

    @staticmethod
    def _untrained() -> AutoencoderKLQwenImage:
        model = AutoencoderKLQwenImage(
            base_dim=8,
            dim_mult=[2, 3, 6, 6],
            num_res_blocks=1,
            z_dim=LATENTS,
            latents_mean=[0.0] * LATENTS,
            latents_std=[1.0] * LATENTS,
        )
        with torch.no_grad():  # the two maps around the latents begin as the identity
            for conv in (model.quant_conv, model.post_quant_conv):
                conv.weight.copy_(torch.eye(conv.out_channels)[:, :, None, None, None])
                conv.bias.zero_()
        return model

    @property
    def encoder(self) -> Coder:
        coder, levels, resnets = self.model.encoder, list[Level](), list[nn.Module]()
        for block in coder.down_blocks:
            if isinstance(block, QwenImageResample):
                levels.append(Level(resnets, block.resample[1]))
                resnets = []
            else:
                resnets.append(block)
        return Coder(coder.conv_in, (*levels, Level(resnets, None)), coder.conv_out)

    @property
    def decoder(self) -> Coder:
        coder = self.model.decoder
        levels = [Level(b.resnets, b.upsamplers[0].resample[1] if b.upsamplers else None) for b in coder.up_blocks]
        return Coder(coder.conv_in, tuple(levels), coder.conv_out)

    def encode(self, pictures: Tensor) -> Tensor:
        return self.model.encode(pictures.unsqueeze(2)).latent_dist.mode().squeeze(2)

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents.unsqueeze(2)).sample.squeeze(2)

    def standardise(self, latents: Tensor) -> None:
        by_channel = latents.movedim(1, 0).flatten(1)
        mean, std = by_channel.mean(1).tolist(), by_channel.std(1).tolist()
        self.model.register_to_config(latents_mean=mean, latents_std=std)
