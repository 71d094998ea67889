"""Wan 2.1's text-to-video network with layers that show it references: pictures of subjects that its video is to hold.

`clip_proj` and `vae_proj` bring what CLIP and the VAE make of a reference to the network's width. In every block `k_vae`, `v_vae`
and `norm_k_vae` attend to these tokens with the queries of the text's attention, and what they find is added to what the text
gave, before `to_out`; with `fused` so do `k_fused`, `v_fused` and `norm_k_fused`, to references and text together. The names are
those of the system that this one takes the place of, and so are the layers of the projections.

At their start the new layers change nothing that can be seen: the values are `START` of their size. They are not 0, with which no
gradient would reach keys and projections before the first update.

Shapes: B batch, C latent channels (16), f h w latents, T text tokens (512), N tokens of all references, D the network's width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

START = 1e-4
PATCH = (1, 2, 2)


class ReferenceAttention:
    """The processor of a block's `attn2`, whose context begins with reference tokens and ends with T text tokens."""

    _attention_backend = _parallel_config = None  # which diffusers sets on all processors of a network

    def __init__(self, text_len: int):
        self.text_len = text_len

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> Tensor:
        context, first = encoder_hidden_states, encoder_hidden_states.shape[1] - self.text_len
        query, references, text = attn.norm_q(attn.to_q(hidden_states)), context[:, :first], context[:, first:]

        def seen(key: Tensor, value: Tensor) -> Tensor:
            heads = (tensor.unflatten(2, (attn.heads, -1)).transpose(1, 2) for tensor in (query, key, value))
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

        found = seen(attn.norm_k(attn.to_k(text)), attn.to_v(text))
        if first:
            found = found + seen(attn.norm_k_vae(attn.k_vae(references)), attn.v_vae(references))
        if first and hasattr(attn, "k_fused"):
            found = found + seen(attn.norm_k_fused(attn.k_fused(context)), attn.v_fused(context))
        return attn.to_out[0](found)


def projection(width: int, inner: int) -> nn.Sequential:
    """From a width to the network's."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, inner),
        nn.GELU(approximate="tanh"),
        nn.Linear(inner, inner),
        nn.LayerNorm(inner),
    )


class WanSubjectTransformer3DModel(WanTransformer3DModel):
    _keep_in_fp32_modules = None  # the trainer computes all layers in one dtype, and so do samplers

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = PATCH,
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: None = None,
        added_kv_proj_dim: None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: None = None,
        text_len: int = 512,
        clip_dim: int = 1280,
        fused: bool = False,
    ):
        """The arguments of `WanTransformer3DModel`; those of a first frame stay None. text_len: T; clip_dim: of a token."""
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            rope_max_seq_len=rope_max_seq_len,
        )
        inner = num_attention_heads * attention_head_dim
        self.clip_proj = projection(clip_dim, inner)
        self.vae_proj = projection(math.prod(patch_size) * in_channels, inner)
        self.condition_embedder.image_embedder = nn.Identity()  # tokens come to the network projected
        for block in self.blocks:
            for path in ("vae", "fused") if fused else ("vae",):
                setattr(block.attn2, f"k_{path}", nn.Linear(inner, inner))
                setattr(block.attn2, f"v_{path}", nn.Linear(inner, inner))
                setattr(block.attn2, f"norm_k_{path}", nn.RMSNorm(inner, eps=eps))
            block.attn2.set_processor(ReferenceAttention(text_len))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        clip: Tensor | None = None,
        references: Tensor | None = None,
        **given: Any,
    ) -> Any:
        """What `WanTransformer3DModel` gives of hidden_states (B, C, f, h, w), timestep (B,), encoder_hidden_states (B, T, …).

        clip: (B, tokens, clip_dim) of all references; references: their latents (B, number, C, h, w). Neither: none are shown.
        """
        tokens = None
        if clip is not None and references is not None:
            tokens = torch.cat([self.clip_proj(clip), self.vae_proj(patches(references))], dim=1)
        return super().forward(
            hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image=tokens, **given
        )


def patches(references: Tensor) -> Tensor:
    """(B, number · h/2 · w/2, 4 C) of (B, number, C, h, w)."""
    _, down, across = PATCH
    cut = references.unflatten(-1, (-1, across)).unflatten(-3, (-1, down))  # (B, number, C, h/2, 2, w/2, 2)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)


def is_new(name: str) -> bool:
    """Whether a parameter is of a layer that `WanTransformer3DModel` has not."""
    return name.startswith(("clip_proj.", "vae_proj.")) or (
        ".attn2." in name and ("_vae." in name or "_fused." in name)
    )


@torch.no_grad()
def with_references(base: WanTransformer3DModel, *, clip_dim: int, text_len: int, fused: bool, seed: int = 0) -> Any:
    """A network that computes what `base` does, and that can learn to see references: its new layers at their start, in fp32.

    The tensors of `base` are its own.
    """
    config = {name: value for name, value in base.config.items() if name in SHARED}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = WanSubjectTransformer3DModel(**config, clip_dim=clip_dim, text_len=text_len, fused=fused)
    for name, layer in network.named_modules():
        if name.endswith((".v_vae", ".v_fused")):
            assert isinstance(layer, nn.Linear)
            layer.weight.mul_(START)
            layer.bias.zero_()
        if name.endswith(".attn2") and fused:
            layer.k_fused.load_state_dict(layer.to_k.state_dict())
            layer.norm_k_fused.load_state_dict(layer.norm_k.state_dict())
    report = network.load_state_dict(base.state_dict(), strict=False, assign=True)
    assert not report.unexpected_keys and all(map(is_new, report.missing_keys)), report
    return network


SHARED = (
    *("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim"),
    *("ffn_dim", "num_layers", "cross_attn_norm", "qk_norm", "eps", "rope_max_seq_len"),
)
"""Of the configuration of `WanTransformer3DModel`."""
