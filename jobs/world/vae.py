"""The VAE of the miniature world: diffusers' `AutoencoderKL`, as FLUX's with 16 latent channels at an eighth of the size.

From random weights it is at 21 dB where this is at 29, after equal time, because its group norms hide brightness. So it starts as
a linear autoencoder, and learns from there: the encoder as principal components of 2×2 patches, level by level; the decoder as
smooth upsampling of each place's mean colour. In every level the first channels carry these signals along the shortcuts, all
other branches begin at zero, and the last two channels are ±LEVEL, so large that one norm over all channels hardly changes with
the picture. A signal beside its negative passes SiLU unchanged: silu(x) − silu(−x) = x.

Trained with MSE and L1 on noisy latents, whose deviation its scaling_factor then makes 1. Left out: adversarial and perceptual
losses.
"""

import math

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.world.data import Shots, random_of
from jobs.world.looks import KINDS, draw_source, edit, render

CHANNELS, LATENTS, BATCH = (16, 24, 48, 64), 16, 4
LEARNING_RATE, WARMUP, NOISE = 1.5e-3, 50, 0.05
LEVEL = 4.0
SAMPLED = 384
"""Pictures that the linear start is worked out from."""


def untrained() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=1,
        shift_factor=0.0,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def pictures(shots: Shots, count: int, random: torch.Generator) -> Tensor:
    """(count, 3, H, W) in −1 … 1: photos at random, before or after an edit."""
    rows = torch.randint(len(shots), (count,), generator=random)
    look, kinds = draw_source(count, random), torch.randint(len(KINDS), (count,), generator=random)
    edited = torch.rand(count, 1, generator=random) < 0.5
    return 2 * render(shots.photos[rows], torch.where(edited, edit(look, kinds, random), look)) - 1


def train_vae(shots: Shots, *, steps: int, seed: int) -> AutoencoderKL:
    """A VAE for pictures like these, in eval mode, with latents of mean 0 and deviation 1 by its shift and scaling factors."""
    torch.manual_seed(seed)
    random = random_of(seed, "vae")
    vae = untrained()
    start_linear(vae, pictures(shots, SAMPLED, random))
    vae = vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * cosine + 1e-5
        given = pictures(shots, BATCH, random).contiguous(memory_format=torch.channels_last)
        latents = vae.encode(given).latent_dist.mode()
        drawn = vae.decode(latents + NOISE * torch.randn_like(latents)).sample
        loss = F.mse_loss(drawn, given) + 0.2 * F.l1_loss(drawn, given) + 1e-4 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
    vae = vae.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    with torch.no_grad():
        latents = vae.encode(pictures(shots, SAMPLED, random)).latent_dist.mode()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae


@torch.no_grad()
def start_linear(vae: AutoencoderKL, given: Tensor) -> None:
    """Set the weights of an untrained VAE by pictures (N, 3, H, W) in −1 … 1."""
    encoder, decoder = vae.encoder, vae.decoder
    for name, parameter in vae.named_parameters():
        if ".conv2." in name or ".to_out.0." in name:
            parameter.zero_()
    _carry(encoder.conv_in, torch.eye(3))
    signal = given
    for level, block in enumerate(encoder.down_blocks):
        _along(block.resnets[0], signal.shape[1])
        if level < 3:
            last = level == 2
            directions, offset = _components(signal, LATENTS if last else CHANNELS[level] - 2)
            if last:  # most of the way to components of deviation 1, where the exponent is −1
                directions = directions * _at(signal, directions, offset).std((0, 2, 3)).pow(-0.7)[:, None]
            signal = _at(signal, directions, offset)
            patches = directions.unflatten(1, (-1, 2, 2))
            bias = -directions @ offset
            if last:
                signal, patches, bias = (
                    torch.cat([part, -part], dim) for part, dim in ((signal, 1), (patches, 0), (bias, 0))
                )
            _carry(block.downsamplers[0].conv, patches, bias, corner=0)
    latents = signal[:, :LATENTS]
    scale = _scale(signal)
    _read(encoder.conv_out, torch.cat([torch.eye(LATENTS), -torch.eye(LATENTS)], 1) * scale)
    encoder.conv_out.bias[LATENTS:] = -6.0  # log variance

    flat = latents.movedim(1, -1).flatten(0, -2)
    colours = F.avg_pool2d(given, 8).movedim(1, -1).flatten(0, -2)
    fitted = torch.linalg.lstsq(torch.cat([flat, torch.ones(len(flat), 1)], 1), colours).solution.T
    matrix, bias = fitted[:, :-1], fitted[:, -1]
    carried = 6 + LATENTS
    _carry(
        decoder.conv_in,
        torch.cat([matrix, -matrix, torch.eye(LATENTS)]),
        torch.cat([bias, -bias, torch.zeros(LATENTS)]),
    )
    binomial = torch.tensor([0.25, 0.5, 0.25])
    smooth = binomial[:, None] * binomial
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            _along(resnet, carried)
        carried = min(carried, block.resnets[0].conv2.out_channels - 2)
        if block.upsamplers:
            _carry(block.upsamplers[0].conv, torch.eye(carried)[:, :, None, None] * smooth, corner=0)
    out = torch.cat([colours, -colours], 1)
    others = LEVEL**2 * 2 + flat.square().mean().item() * (CHANNELS[0] - 8)
    scale = math.sqrt((out.square().mean().item() * 6 + others) / CHANNELS[0])
    _read(decoder.conv_out, torch.cat([torch.eye(3), -torch.eye(3)], 1) * scale)
    decoder.conv_out.bias.zero_()


def _components(signal: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(at most count, 4 C) directions of most variance of the 2×2 patches of (N, C, H, W), and their mean (4 C,)."""
    patches = F.unfold(signal, 2, stride=2).movedim(1, -1).flatten(0, -2)
    offset = patches.mean(0)
    _, vectors = torch.linalg.eigh((patches - offset).T @ (patches - offset))
    return vectors.flip(1)[:, :count].T, offset


def _at(signal: Tensor, directions: Tensor, offset: Tensor) -> Tensor:
    """The patches of (N, C, H, W) along the directions, (N, K, H/2, W/2)."""
    patches = F.unfold(signal, 2, stride=2) - offset[:, None]
    return (directions @ patches).unflatten(2, (signal.shape[2] // 2, signal.shape[3] // 2))


def _carry(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None = None, corner: int = 1) -> None:
    """Let the first outputs be this map of the first inputs, the last two ±LEVEL and the others small.

    weight: (out, in[, height, width]), whose taps begin at `corner` of the kernel.
    """
    taps = weight if weight.ndim == 4 else weight[:, :, None, None]
    outputs, inputs, height, width = taps.shape
    conv.weight.mul_(0.1)
    conv.bias.zero_()
    conv.weight[:outputs] = 0
    conv.weight[-2:] = 0
    conv.bias[-2:] = torch.tensor([LEVEL, -LEVEL])
    if conv.kernel_size == (1, 1):
        corner = 0
    conv.weight[:outputs, :inputs, corner : corner + height, corner : corner + width] = taps
    if bias is not None:
        conv.bias[:outputs] = bias


def _along(resnet: nn.Module, signals: int) -> None:
    """Carry the first signals along a resnet's shortcut, which is the identity where it has no convolution."""
    if resnet.conv_shortcut is not None:
        _carry(resnet.conv_shortcut, torch.eye(min(signals, resnet.conv_shortcut.out_channels - 2), signals))


def _scale(signal: Tensor) -> float:
    """What the norm in front of the last convolution divides by."""
    return math.sqrt((signal.square().sum(1).mean().item() + 2 * LEVEL**2) / CHANNELS[-1])


def _read(conv: nn.Conv2d, weight: Tensor) -> None:
    """Let the first outputs be this map (out, in) of the first inputs, and the others almost 0."""
    conv.weight.mul_(0.02)
    conv.bias.zero_()
    outputs, inputs = weight.shape
    conv.weight[:outputs] = 0
    conv.weight[:outputs, :inputs, 1, 1] = weight


def reconstructed(vae: AutoencoderKL, given: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in 0 … 1, encoded and decoded."""
    with torch.inference_mode():
        parts = [vae.decode(vae.encode(2 * part - 1).latent_dist.mode()).sample for part in given.split(64)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def decibels(one: Tensor, other: Tensor) -> float:
    """Mean peak signal-to-noise ratio of pictures (N, 3, H, W) in 0 … 1."""
    return (-10 * torch.log10((one - other).square().mean((1, 2, 3)))).mean().item()
