"""The base of all methods of masked image modelling: an encoder of patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from famt.models import ModelConfig
from famt.sampling import PatchSplit


class BlockFusion(nn.Module):
    """Learned average of the outputs of some blocks and the last one, for the decoder.

    So the last block need not carry every detail. Liu et al., "Improving Pixel-based MIM by
    Reducing Wasted Modeling Capability" (MFF), ICCV 2023 (arXiv 2308.00261): each shallow block has
    its own linear layer; the weights are learned, under a softmax. The exported encoder has none of
    this.

    Args:
        width: of tokens.
        blocks: numbers of the shallow blocks, from 0, rising, without the last.
    """

    def __init__(self, width: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = blocks
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in blocks)
        self.weights = nn.Parameter(torch.ones(len(blocks) + 1))

    def forward(self, blocks: Iterable[Callable[[Tensor], Tensor]], tokens: Tensor) -> Tensor:
        """Run all `blocks` on tokens `[B, T, width]`; returns the average, of the same shape."""
        projections, shallow = dict(zip(self.blocks, self.projections, strict=True)), []
        for number, block in enumerate(blocks):
            tokens = block(tokens)
            if number in projections:
                shallow.append(projections[number](tokens))
        weights = self.weights.softmax(0)
        return sum(weight * each for weight, each in zip(weights, [*shallow, tokens], strict=True))  # type: ignore[return-value]


class MaskedModel(nn.Module):
    """A timm ViT that learns by predicting masked patches.

    A method is a subclass with `predict`, which runs encoder and decoder, `error`, which compares
    pixels, and `unofficial`. Its constructor calls `initialise`. A line in
    `famt.methods.METHODS` gives it a name.

    Attributes:
        config: all that the model is built from.
        encoder: a timm `VisionTransformer` without a head, under timm's keys.
        prefix: number of the encoder's class and register tokens, which precede those of patches.
        checkpoint_blocks: recompute activations inside blocks in the backward pass: less memory for
            a third more time.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = config.encoder()
        self.prefix: int = self.encoder.num_prefix_tokens
        self.fusion = BlockFusion(config.width, config.fused) if config.fused else None
        self.checkpoint_blocks = False
        self.encoder.eval()

    def train(self, mode: bool = True) -> MaskedModel:
        """Set the mode of all but the encoder, which stays in eval mode.

        It has neither dropout nor batch norm, so the mode changes nothing. Passes for scores then
        need not switch 250 modules twice a step, 9 ms on the host.
        """
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(
        self,
        visible: Tensor,
        masked: Tensor,
        split: PatchSplit,
        loss_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean error of masked patches, predicted from the visible ones.

        Args:
            visible: `[B, V, P*P*3]` float, normalised pixels of `split.visible`.
            masked: `[B, K, P*P*3]` float, normalised pixels of `split.predicted`.
            split: positions of the patches.
            loss_weights: `[B, K]`, factors of the patches' errors.

        Returns:
            scalar loss, and each patch's mean error `[B, K]`, detached; both float32.
        """
        prediction = self.predict(visible, split)
        return self.loss(prediction, masked, loss_weights)

    def predict(self, visible: Tensor, split: PatchSplit) -> Tensor:
        """Predict the patches `split.predicted`.

        Args:
            visible, split: as in `forward`.

        Returns:
            `[B, K, P*P*3]`, in the order of `split.predicted`, comparable to `target`.
        """
        raise NotImplementedError

    def error(self, difference: Tensor) -> Tensor:
        """Elementwise error of predictions minus targets."""
        raise NotImplementedError

    @property
    def unofficial(self) -> str | None:
        """The part that the MAE authors' checkpoints have no place for, in words; None if none."""
        raise NotImplementedError

    def embed(self, patches: Tensor, index: Tensor) -> Tensor:
        """Patches `[B, V, P*P*3]` at raster positions `index [B, V]` -> tokens `[B, V, width]`."""
        projection = self.encoder.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)
        tokens = self.encoder.patch_embed.norm(F.linear(patches, weight, projection.bias))
        return tokens + self.positions(index)

    def positions(self, index: Tensor) -> Tensor:
        """The encoder's positions of patches `index [B, V]`, `[B, V, width]`."""
        return self.encoder.pos_embed[0, self._positions_before_patches + index]

    @property
    def _positions_before_patches(self) -> int:
        return self.encoder.pos_embed.shape[1] - self.encoder.patch_embed.num_patches

    def transform(self, tokens: Tensor) -> Tensor:
        """The encoder's blocks and last norm on tokens `[B, T, width]` -> `[B, P+T, width]`, with
        its P class and register tokens first."""
        encoder = self.encoder
        own = [each for each in (encoder.cls_token, encoder.reg_token) if each is not None]
        if own:
            first = torch.cat(own, dim=1)
            if before := self._positions_before_patches:
                first = first + encoder.pos_embed[:, :before]
            tokens = torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = encoder.norm_pre(tokens)
        blocks = self.stages(encoder.blocks)
        if self.fusion is not None:
            return encoder.norm(self.fusion(blocks, tokens))
        for block in blocks:
            tokens = block(tokens)
        return encoder.norm(tokens)

    def stages(self, blocks: Iterable[nn.Module]) -> list[Callable[..., Tensor]]:
        """Blocks to call; with `checkpoint_blocks` the backward pass recomputes their activations
        (Chen et al., arXiv 1604.06174)."""
        if not self.checkpoint_blocks or not torch.is_grad_enabled():
            return list(blocks)
        return [
            partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)  # no dropout
            for block in blocks
        ]

    def encode(self, patches: Tensor, index: Tensor) -> Tensor:
        """Patches `[B, V, P*P*3]` at positions `index [B, V]` -> tokens `[B, prefix+V, width]`."""
        return self.transform(self.embed(patches, index))

    def loss(
        self, prediction: Tensor, masked: Tensor, loss_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean error against the target of `masked`, and each patch's own; in float32 under any
        autocast. See `forward`."""
        error = self.error(prediction.float() - self.target(masked))
        of_patches = error.detach().mean(-1)
        if loss_weights is None:
            return error.mean(), of_patches
        return (error.mean(-1) * loss_weights).mean(), of_patches

    def target(self, masked: Tensor) -> Tensor:
        """Targets: pixels, normalised within each patch if the config says so."""
        masked = masked.float()
        if not self.config.normalise_targets:
            return masked
        mean, deviation = _moments(masked)
        return (masked - mean) / deviation

    def reconstruct(self, visible: Tensor, masked: Tensor, split: PatchSplit) -> Tensor:
        """The predicted patches as pixels, `[B, K, P*P*3]`; arguments as in `forward`.

        Where targets are normalised, the mean and deviation of each patch are those of `masked`.
        """
        prediction = self.predict(visible, split).float()
        if not self.config.normalise_targets:
            return prediction
        mean, deviation = _moments(masked.float())
        return prediction * deviation + mean

    def initialise(self) -> None:
        """MAE's initialisation: Xavier for all linear layers, the patch projection included."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.flatten(1))
        if self.encoder.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.encoder.patch_embed.proj.bias)
        if self.encoder.cls_token is not None:
            nn.init.normal_(self.encoder.cls_token, std=0.02)


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()
