"""Sizes of models and of their inputs, with names for the common ones.

Command lines read this module, so torch and timm are imported only where an encoder is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

Decoder = Literal["self", "cross"]


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Sizes of images and patches, and what of the patches is reconstructed.

    Raises:
        ValueError: the image does not divide into patches and units, or an option is out of range.
    """

    image_size: int = 224
    """side of the square input, px"""
    patch_size: int = 16
    """side of a patch, px"""
    unit: int = 1
    """patches a side of the squares that are masked as a whole (SimMIM)"""
    low_pass: float | None = None
    """highest frequency to reconstruct, cycles per image side (PixMIM); None for all"""

    def __post_init__(self) -> None:
        self._at_least_1("image_size", "patch_size", "unit")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image size {self.image_size} is no multiple of patch size {self.patch_size}"
            )
        if self.grid % self.unit:
            raise ValueError(f"{self.grid} patches a side do not divide into units of {self.unit}")
        if self.low_pass is not None and not 0 <= self.low_pass < math.inf:
            raise ValueError(f"low_pass {self.low_pass} must be a number of at least 0")

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    def _at_least_1(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(PatchConfig):
    """All that a model is built from; its `dataclasses.asdict` goes into checkpoints.

    Raises:
        ValueError: as of `PatchConfig`, or a width does not divide into its heads.
    """

    width: int
    """encoder token width"""
    depth: int
    """encoder blocks"""
    heads: int
    """encoder attention heads"""
    decoder: Decoder = "self"
    """self-attention as in MAE, or cross: masked patches attend to visible ones only (CrossMAE)"""
    decoder_width: int = 512
    """decoder token width"""
    decoder_depth: int = 8
    """decoder blocks"""
    decoder_heads: int = 16
    """decoder attention heads"""
    normalise_targets: bool = True
    """reconstruct each patch less its own mean, over its own deviation (MAE, section 4.1)"""
    fused: tuple[int, ...] = ()
    """blocks, from 0, whose outputs reach the decoder together with the last block's (MFF)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_1(
            "width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads"
        )
        shallow = range(self.depth - 1)
        if list(self.fused) != [block for block in shallow if block in self.fused]:
            raise ValueError(
                f"fused {self.fused} must be rising numbers of blocks from 0 to {self.depth - 2}, "
                "each before the last"
            )
        for part, width, heads in (
            ("encoder", self.width, self.heads),
            ("decoder", self.decoder_width, self.decoder_heads),
        ):
            if width % heads or width % 4:
                raise ValueError(
                    f"{part} width {width} must be a multiple of its {heads} heads, and of 4 for "
                    "its sin-cos positions"
                )

    @classmethod
    def of(cls, encoder: VisionTransformer) -> ModelConfig:
        """The sizes of an encoder, with the default decoder."""
        return cls(
            width=encoder.embed_dim,
            depth=len(encoder.blocks),
            heads=encoder.blocks[0].attn.num_heads,
            image_size=encoder.patch_embed.img_size[0],
            patch_size=encoder.patch_embed.patch_size[0],
        )

    def encoder(self) -> VisionTransformer:
        """A timm ViT with fixed 2-D sin-cos positions and no head, not initialised for training."""
        from timm.models.vision_transformer import VisionTransformer
        from torch import nn

        encoder = VisionTransformer(
            img_size=self.image_size,
            patch_size=self.patch_size,
            embed_dim=self.width,
            depth=self.depth,
            num_heads=self.heads,
            num_classes=0,
            weight_init="skip",
        )
        encoder.pos_embed = sincos_positions(self.grid, self.width)
        nn.init.zeros_(encoder.cls_token)  # timm leaves it uninitialised
        return encoder


def sincos_positions(grid: int, width: int) -> nn.Parameter:
    """`[1, 1 + grid**2, width]`, not trained; the class token's is zero (MAE, appendix A.1)."""
    import torch
    from timm.layers import build_sincos2d_pos_embed

    patches = build_sincos2d_pos_embed([grid, grid], width)
    positions = torch.cat([torch.zeros(1, width), patches])[None]
    return torch.nn.Parameter(positions, requires_grad=False)


# A name stands for widths, depths and heads, and default image and patch sizes.
MODELS: dict[str, ModelConfig] = {
    "vit_nano": ModelConfig(
        width=96, depth=6, heads=3, image_size=32, patch_size=4,
        decoder_width=64, decoder_depth=2, decoder_heads=2,
    ),
    "vit_micro": ModelConfig(
        width=192, depth=6, heads=3, image_size=32, patch_size=4,
        decoder_width=96, decoder_depth=2, decoder_heads=3,
    ),
    "vit_tiny": ModelConfig(width=192, depth=12, heads=3),
    "vit_small": ModelConfig(width=384, depth=12, heads=6),
    "vit_base": ModelConfig(width=768, depth=12, heads=12),
    "vit_large": ModelConfig(width=1024, depth=24, heads=16),
    "vit_huge": ModelConfig(width=1280, depth=32, heads=16, patch_size=14),
}  # fmt: skip
