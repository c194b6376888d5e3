"""SimMIM: the encoder itself sees mask tokens, and one linear layer predicts the pixels.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022. Plain SimMIM masks
60 % of the 32-px units at random and throws nothing. With throwing (Gui et al., arXiv 2211.15362
v3: 44 % masked, 26 % thrown) the encoder sees 74 % of the tokens. The paper's ViT also has relative
positions; this one has MAE's alone, so that its encoder can be used wherever MAE's can.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from famt.masked import MaskedModel
from famt.models import ModelConfig
from famt.sampling import PatchSplit


class SimMIM(MaskedModel):
    """A timm ViT over visible patches and mask tokens, and a head of one layer.

    Raises:
        ValueError: the config has a cross decoder.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.decoder != "self":
            raise ValueError(f"SimMIM has no decoder that could be {config.decoder!r}")
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.decoder_pred = nn.Linear(config.width, config.patch_size**2 * 3)
        self.initialise()
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def predict(self, visible: Tensor, split: PatchSplit) -> Tensor:
        """Pixels of the predicted patches `[B, K, P*P*3]`; see `MaskedModel`.

        Each predicted patch has a mask token; other masked patches have none.
        """
        hidden = self.mask_token + self.positions(split.predicted)
        tokens = self.transform(torch.cat([self.embed(visible, split.visible), hidden], dim=1))
        return self.decoder_pred(tokens[:, -hidden.shape[1] :])

    def error(self, difference: Tensor) -> Tensor:
        """Absolute error (section 3.4)."""
        return difference.abs()

    @property
    def unofficial(self) -> str:
        """Its head."""
        return "SimMIM head"
