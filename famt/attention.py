"""Attention of a vision transformer's last block, and scores computed from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.layers import Attention, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def attention_scores(attn: Tensor) -> Tensor:
    """FAMT's attention score of each patch.

    Gui et al., arXiv 2211.15362 v3, section III. With A = `attn`, index 0 the class token, h over
    heads and m over patches: `mean_h(A[h,0,n] * mean_m A[h,m,0])`, attention of the class token to
    patch n, plus `mean_h(mean_m A[h,m,n] * A[h,0,0])`, attention of the patches to it.

    Args:
        attn: `[B, H, N+1, N+1]` softmax attention, rows summing to 1.

    Returns:
        `[B, N]` float32, >= 0.

    Raises:
        ValueError: `attn` is not `[B, H, N+1, N+1]`.
    """
    attn = _checked(attn)
    patch_to_cls = attn[:, :, 1:, 0].mean(2, keepdim=True)  # [B, H, 1]
    by_cls = (attn[:, :, 0, 1:] * patch_to_cls).mean(1)
    by_patches = (attn[:, :, 1:, 1:].mean(2) * attn[:, :, 0, :1]).mean(1)
    return by_cls + by_patches


def cls_attention(attn: Tensor) -> Tensor:
    """AMT's attention score: the class token's row, each head scaled to [0, 1], mean over heads.

    Gui et al., "Good Helper Is around You: Attention-driven Masked Image Modeling", AAAI 2023.
    A head with equal attention to all patches adds 1 to each before the mean.

    Args:
        attn: `[B, H, N+1, N+1]` softmax attention.

    Returns:
        `[B, N]` float32 in [0, 1].

    Raises:
        ValueError: `attn` is not `[B, H, N+1, N+1]`.
    """
    row = _checked(attn)[:, :, 0, 1:]
    low, high = row.amin(-1, keepdim=True), row.amax(-1, keepdim=True)
    span = high - low
    flat = span <= 1e-6 * high  # the same up to rounding
    scaled = (row - low) / span.masked_fill(flat, 1.0)
    return torch.where(flat, torch.ones_like(row), scaled).mean(1)


@torch.no_grad()
def last_attention(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """Softmax attention of a timm ViT's last block on whole, unmasked images.

    All blocks but the last run unchanged, fused kernels included; of the last one only queries and
    keys are computed. The encoder runs in eval mode, and its training flag is restored.

    Args:
        encoder: a timm `VisionTransformer` with a class token, such as
            `MaskedAutoencoder.encoder`.
        images: `[B, 3, H, W]`, normalised as the encoder expects; for another size than the
            encoder's, positions are interpolated.

    Returns:
        `[B, heads, N+1, N+1]` float32; index 0 is the class token. Register tokens are left out of
        the softmax.

    Raises:
        ValueError: the encoder has no class token, or its last block no joint `qkv` projection.
    """
    with _evaluating(encoder):
        return _attention(encoder, _before_last_block(encoder, images))


@torch.no_grad()
def last_block(encoder: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """The result of `last_attention`, and the last block's output tokens from the same pass.

    Args:
        encoder, images: as in `last_attention`.

    Returns:
        attention `[B, heads, N+1, N+1]` and patch tokens `[B, N, C]`, before the encoder's final
        norm; both float32.
    """
    with _evaluating(encoder):
        x = _before_last_block(encoder, images)
        tokens = encoder.blocks[-1](x)[:, encoder.num_prefix_tokens :]
        return _attention(encoder, x), tokens.float()


def attention_of(attention: Attention, projected: Tensor) -> Tensor:
    """Softmax attention from the output of a timm attention's `qkv` layer.

    Args:
        attention: the layer.
        projected: `[B, N, 3C]` queries, keys and values, or `[B, N, 2C]` without the values.

    Returns:
        `[B, heads, N, N]` float32, rows summing to 1.
    """
    width = attention.num_heads * attention.head_dim
    batch, tokens, _ = projected.shape
    qk = projected[..., : 2 * width].reshape(batch, tokens, 2, attention.num_heads, -1)
    q, k = qk.permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    logits = (q * attention.scale) @ k.transpose(-2, -1)
    return logits.float().softmax(-1)


def without_registers(encoder: VisionTransformer, tokens: Tensor) -> Tensor:
    """Tokens `[B, T, C]` of an encoder with a class token, less its register tokens."""
    if encoder.num_prefix_tokens == 1:
        return tokens
    return torch.cat([tokens[:, :1], tokens[:, encoder.num_prefix_tokens :]], dim=1)


@contextmanager
def _evaluating(encoder: VisionTransformer) -> Iterator[None]:
    if not encoder.training:
        yield
        return
    encoder.eval()
    try:
        yield
    finally:
        encoder.train()


def _before_last_block(encoder: VisionTransformer, images: Tensor) -> Tensor:
    if not encoder.has_class_token:
        raise ValueError("the encoder has no class token, by which the scores are defined")
    x = encoder.norm_pre(_embed(encoder, images))
    for block in encoder.blocks[:-1]:
        x = block(x)
    return x


def _attention(encoder: VisionTransformer, x: Tensor) -> Tensor:
    block = encoder.blocks[-1]
    attention = block.attn
    if not hasattr(attention, "qkv"):
        raise ValueError(f"{type(attention).__name__} of the last block has no qkv projection")
    width = attention.num_heads * attention.head_dim
    weight, bias = attention.qkv.weight, attention.qkv.bias
    qk = F.linear(block.norm1(x), weight[: 2 * width], None if bias is None else bias[: 2 * width])
    return attention_of(attention, without_registers(encoder, qk))


def _embed(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """Prefix and patch tokens with their positions, `[B, P+N, C]`, at any image size."""
    if tuple(images.shape[2:]) == encoder.patch_embed.img_size:
        return encoder.patch_drop(encoder._pos_embed(encoder.patch_embed(images)))
    patches = encoder.patch_embed.proj(images)
    before = encoder.pos_embed.shape[1] - encoder.patch_embed.num_patches
    position = resample_abs_pos_embed(
        encoder.pos_embed, list(patches.shape[2:]), list(encoder.patch_embed.grid_size), before
    )
    own = [each for each in (encoder.cls_token, encoder.reg_token) if each is not None]
    prefix = [each.expand(len(images), -1, -1) for each in own]
    tokens = encoder.patch_embed.norm(patches.flatten(2).transpose(1, 2))
    if before:
        return torch.cat([*prefix, tokens], dim=1) + position
    return torch.cat([*prefix, tokens + position], dim=1)


def _checked(attn: Tensor) -> Tensor:
    if attn.ndim != 4 or attn.shape[-1] != attn.shape[-2] or attn.shape[-1] < 2:
        raise ValueError(f"attn must be [B, H, N+1, N+1], got {list(attn.shape)}")
    return attn.float()
