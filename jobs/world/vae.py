"""Training of the miniature worlds' VAEs, which have 16 latent channels at an eighth of the size.

From random weights FLUX's is at 21 dB where this is at 29, after equal time, because its norms hide brightness. So a VAE starts
as a linear autoencoder, and learns from there: the encoder as principal components of 2×2 patches, level by level; the decoder as
smooth upsampling of each place's mean colour. In every level the first channels carry these signals along the shortcuts, all
other branches begin at zero, and the last two channels are ±LEVEL, so large that a norm over all channels hardly changes with
the picture. A signal beside its negative passes SiLU unchanged: silu(x) − silu(−x) = x.

Trained with MSE and L1 on noisy latents, whose deviation its config then makes 1. Left out: adversarial and perceptual losses.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.world.autoencoders import LATENTS, Autoencoder
from jobs.world.data import Shots, random_of
from jobs.world.looks import KINDS, draw_source, edit, render

BATCH = 4
LEARNING_RATE, WARMUP, NOISE = 1.5e-3, 50, 0.05
LEVEL = 4.0
SAMPLED = 384
"""Pictures that the linear start is worked out from."""


def pictures(shots: Shots, count: int, random: torch.Generator) -> Tensor:
    """(count, 3, H, W) in −1 … 1: photos at random, before or after an edit."""
    rows = torch.randint(len(shots), (count,), generator=random)
    look, kinds = draw_source(count, random), torch.randint(len(KINDS), (count,), generator=random)
    edited = torch.rand(count, 1, generator=random) < 0.5
    return 2 * render(shots.photos[rows], torch.where(edited, edit(look, kinds, random), look)) - 1


def train_vae(untrained: Callable[[], Autoencoder], shots: Shots, *, steps: int, seed: int) -> Autoencoder:
    """A VAE for pictures like these, in eval mode, whose config makes latents standard."""
    torch.manual_seed(seed)
    random = random_of(seed, "vae")
    vae = untrained()
    start_linear(vae, pictures(shots, SAMPLED, random))
    model = vae.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * cosine + 1e-5
        given = pictures(shots, BATCH, random)
        latents = vae.encode(given)
        drawn = vae.decode(latents + NOISE * torch.randn_like(latents))
        loss = F.mse_loss(drawn, given) + 0.2 * F.l1_loss(drawn, given) + 1e-4 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval().requires_grad_(False)
    vae.standardise(vae.encode(pictures(shots, SAMPLED, random)))
    return vae


@torch.no_grad()
def start_linear(vae: Autoencoder, given: Tensor) -> None:
    """Set the weights of an untrained VAE by pictures (N, 3, H, W) in −1 … 1."""
    for name, parameter in vae.model.named_parameters():
        if ".conv2." in name or ".to_out.0." in name or ".proj." in name:
            parameter.zero_()
    latents = _start_encoder(vae, given)
    _start_decoder(vae, latents, given)


def _start_encoder(vae: Autoencoder, given: Tensor) -> Tensor:
    """Principal components of 2×2 patches, level by level. Returns the latents (N, LATENTS, H/8, W/8) of the pictures."""
    coder = vae.encoder
    _carry(coder.conv_in, torch.eye(3))
    signal = given
    for level, (resnets, conv) in enumerate(coder.levels):
        for resnet in resnets:
            _along(resnet, signal.shape[1])
        if conv is None:
            continue
        last = coder.levels[level + 1].resize is None
        directions, offset = _components(signal, LATENTS if last else conv.out_channels - 2)
        if last:  # most of the way to components of deviation 1, where the exponent is −1
            directions = directions * _at(signal, directions, offset).std((0, 2, 3)).pow(-0.7)[:, None]
        signal = _at(signal, directions, offset)
        patches = directions.unflatten(1, (-1, 2, 2))
        bias = -directions @ offset
        if last:
            signal, patches, bias = (
                torch.cat([part, -part], dim) for part, dim in ((signal, 1), (patches, 0), (bias, 0))
            )
        _carry(conv, patches, bias, corner=0)
    power = signal.square().sum(1).mean().item() + 2 * LEVEL**2
    scale = math.sqrt(power / coder.levels[-1].resnets[-1].conv2.out_channels)  # what the norm divides by
    _read(coder.conv_out, torch.cat([torch.eye(LATENTS), -torch.eye(LATENTS)], 1) * scale)
    coder.conv_out.bias[LATENTS:] = -6.0  # log variance
    return signal[:, :LATENTS]


def _start_decoder(vae: Autoencoder, latents: Tensor, given: Tensor) -> None:
    """Each place's mean colour, as far as it is a linear function of the latents, made smooth."""
    coder = vae.decoder
    flat = latents.movedim(1, -1).flatten(0, -2)
    colours = F.avg_pool2d(given, 8).movedim(1, -1).flatten(0, -2)
    fitted = torch.linalg.lstsq(torch.cat([flat, torch.ones(len(flat), 1)], 1), colours).solution.T
    matrix, bias = fitted[:, :-1], fitted[:, -1]
    rows = torch.cat([matrix, -matrix, torch.eye(LATENTS)])
    _carry(coder.conv_in, rows, torch.cat([bias, -bias, torch.zeros(LATENTS)]))
    carried = len(rows)
    binomial = torch.tensor([0.25, 0.5, 0.25])
    smooth = binomial[:, None] * binomial
    for resnets, conv in coder.levels:
        for resnet in resnets:
            carried = _along(resnet, carried)
        if conv is not None:
            kept = min(carried, conv.out_channels - 2)
            _carry(conv, torch.eye(kept, carried)[:, :, None, None] * smooth, corner=0)
            carried = kept
    channels = coder.levels[-1].resnets[-1].conv2.out_channels
    power = colours.square().mean().item() * 6 + LEVEL**2 * 2 + flat.square().mean().item() * (carried - 6)
    _read(coder.conv_out, torch.cat([torch.eye(3), -torch.eye(3)], 1) * math.sqrt(power / channels))


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


def _taps(conv: nn.Module) -> Tensor:
    """The weight (out, in, height, width) that a picture meets: of a causal convolution over films, that of the last frame."""
    return conv.weight if conv.weight.ndim == 4 else conv.weight[:, :, -1]


def _carry(conv: nn.Module, weight: Tensor, bias: Tensor | None = None, corner: int = 1) -> None:
    """Let the first outputs be this map of the first inputs, the last two ±LEVEL and the others small.

    weight: (out, in[, height, width]), whose taps begin at `corner` of the kernel.
    """
    taps = weight if weight.ndim == 4 else weight[:, :, None, None]
    outputs, inputs, height, width = taps.shape
    conv.weight.mul_(0.1)
    conv.bias.zero_()
    there = _taps(conv)
    there[:outputs] = 0
    there[-2:] = 0
    conv.bias[-2:] = torch.tensor([LEVEL, -LEVEL])
    if there.shape[-1] == 1:
        corner = 0
    there[:outputs, :inputs, corner : corner + height, corner : corner + width] = taps
    if bias is not None:
        conv.bias[:outputs] = bias


def _along(resnet: nn.Module, signals: int) -> int:
    """Carry the first signals along a resnet's shortcut, which is the identity where it has no convolution.

    Returns how many there was room for.
    """
    kept = min(signals, resnet.conv2.out_channels - 2)
    if isinstance(resnet.conv_shortcut, nn.Conv2d | nn.Conv3d):
        _carry(resnet.conv_shortcut, torch.eye(kept, signals))
    return kept


def _read(conv: nn.Module, weight: Tensor) -> None:
    """Let the first outputs be this map (out, in) of the first inputs, and the others almost 0."""
    conv.weight.mul_(0.02)
    conv.bias.zero_()
    outputs, inputs = weight.shape
    there = _taps(conv)
    there[:outputs] = 0
    there[:outputs, :inputs, 1, 1] = weight


def reconstructed(vae: Autoencoder, given: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in 0 … 1, encoded and decoded."""
    with torch.inference_mode():
        parts = [vae.decode(vae.encode(2 * part - 1)) for part in given.split(64)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def decibels(one: Tensor, other: Tensor) -> float:
    """Mean peak signal-to-noise ratio of pictures (N, 3, H, W) in 0 … 1."""
    return (-10 * torch.log10((one - other).square().mean((1, 2, 3)))).mean().item()
