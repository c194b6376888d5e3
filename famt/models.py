"""Sizes of models and of their inputs, with names for the common ones.

Command lines read this module, so torch and timm are imported only where an encoder is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

DecoderName = Literal["self", "cross"]


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
                f"image_size {self.image_size} must be a multiple of the patch size, "
                f"{self.patch_size}"
            )
        if self.grid % self.unit:
            raise ValueError(f"unit {self.unit} must divide the {self.grid} patches a side")
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
        ValueError: as of `PatchConfig`, an unknown decoder, or a width that does not divide into
            its heads.
    """

    width: int
    """encoder token width"""
    depth: int
    """encoder blocks"""
    heads: int
    """encoder attention heads"""
    decoder: DecoderName = "self"
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
    timm: str = ""
    """name of the encoder's architecture in timm; empty for MAE's ViT"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_1(
            "width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads"
        )
        if self.decoder not in get_args(DecoderName):
            names = " or ".join(get_args(DecoderName))
            raise ValueError(f"decoder {self.decoder!r} must be {names}")
        shallow = range(self.depth - 1)
        if list(self.fused) != [block for block in shallow if block in self.fused]:
            raise ValueError(
                f"fused {self.fused} must be rising numbers of blocks from 0 to {self.depth - 2}, "
                "each before the last"
            )
        for name, width, heads in (
            ("width", self.width, self.heads),
            ("decoder_width", self.decoder_width, self.decoder_heads),
        ):
            if width % heads or width % 4:
                raise ValueError(
                    f"{name} {width} must be a multiple of its {heads} heads, and of 4 for "
                    "its sin-cos positions"
                )

    @classmethod
    def of(cls, encoder: VisionTransformer) -> ModelConfig:
        """The sizes of an encoder, with the default decoder.

        The architecture is named if `timm.create_model` built the encoder.
        """
        return cls(
            timm=getattr(encoder, "pretrained_cfg", {}).get("architecture", ""),
            width=encoder.embed_dim,
            depth=len(encoder.blocks),
            heads=encoder.blocks[0].attn.num_heads,
            image_size=encoder.patch_embed.img_size[0],
            patch_size=encoder.patch_embed.patch_size[0],
        )

    def encoder(self) -> VisionTransformer:
        """A timm ViT with 2-D sin-cos positions and no head, not initialised for training.

        The positions are fixed. Those of an architecture of timm's begin as sin-cos, and its last
        norm comes before any pooling.
        """
        import torch
        from torch import nn

        if self.timm:
            encoder = self.build(num_classes=0, global_pool="", fc_norm=False)
            positions = sincos_positions(self.grid, self.width)[:, 1:]
            with torch.no_grad():
                encoder.pos_embed.zero_()[:, -(self.grid**2) :] = positions
            return encoder
        encoder = self.build(num_classes=0, weight_init="skip")
        encoder.pos_embed = sincos_positions(self.grid, self.width)
        nn.init.zeros_(encoder.cls_token)  # timm leaves it uninitialised
        return encoder

    def build(self, **options: Any) -> VisionTransformer:
        """A timm ViT of these sizes, as timm initialises it; `options` are its constructor's."""
        if self.timm:
            import timm

            return timm.create_model(
                self.timm, img_size=self.image_size, patch_size=self.patch_size, **options
            )
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=self.image_size,
            patch_size=self.patch_size,
            embed_dim=self.width,
            depth=self.depth,
            num_heads=self.heads,
            **options,
        )


def sincos_positions(grid: int, width: int) -> nn.Parameter:
    """`[1, 1 + grid**2, width]`, not trained; the class token's is zero (MAE, appendix A.1)."""
    import torch
    from timm.layers import build_sincos2d_pos_embed

    patches = build_sincos2d_pos_embed([grid, grid], width)
    positions = torch.cat([torch.zeros(1, width), patches])[None]
    return torch.nn.Parameter(positions, requires_grad=False)


@cache
def timm_model(
    name: str, image_size: int | None = None, patch_size: int | None = None
) -> ModelConfig:
    """The sizes of an architecture of timm, with the default decoder.

    Args:
        name: as `timm.create_model` takes it.
        image_size, patch_size: px, in place of its own.

    Raises:
        ValueError: no such model, or not one whose encoder can see a part of the patches.
    """
    import timm
    import torch

    sizes = {"img_size": image_size, "patch_size": patch_size}
    given = {option: size for option, size in sizes.items() if size is not None}
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
            reason = _not_plain(model)
            if reason is None and given:
                model = timm.create_model(name, num_classes=0, **given)
    except Exception as error:  # each architecture raises its own
        raise ValueError(f"timm:{name}: timm can't build it: {error}") from error
    if reason:
        raise ValueError(f"timm:{name} can't be trained on a part of the patches: {reason}")
    return ModelConfig.of(model)


def _not_plain(model: Any) -> str | None:
    """Why patches of a timm model can't be encoded without the others; None if they can."""
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    kind = type(model)
    overridden = [
        name
        for name in ("_pos_embed", "forward_features")
        if getattr(kind, name, None) is not getattr(VisionTransformer, name)
    ]
    if overridden:
        return f"it is a {kind.__name__}, which is no plain VisionTransformer"
    if type(model.patch_embed) is not PatchEmbed:
        return f"its {type(model.patch_embed).__name__} lets patches overlap"
    if model.pos_embed is None:
        return "it has no position embedding"
    if not hasattr(model.blocks[0], "attn"):
        return f"its blocks are {type(model.blocks[0]).__name__}s"
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    return None if size[0] == size[1] and patch[0] == patch[1] else "its images are not square"


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
