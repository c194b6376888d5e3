"""MAE from lightly's modules, with FAMT's weights and sampling: python docs/examples/lightly_mae.py

Only the lines marked FAMT differ from lightly's MAE, which draws `idx_keep` and `idx_mask` with
`utils.random_token_mask` and decodes every patch.
"""

import timm
import torch
import torch.nn.functional as F
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.modules.masked_vision_transformer_decoder_timm import (
    MaskedVisionTransformerDecoderTIMM,
)
from photos import random_crops
from torch import nn

from famt.attention import attention_scores, last_attention  # FAMT
from famt.frequency import pixel_frequency  # FAMT
from famt.patches import normalise_images
from famt.sampling import patch_weights, sample_patches  # FAMT

SIZE, PATCH, WIDTH, DECODER_WIDTH = 64, 8, 192, 96


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=SIZE, patch_size=PATCH, num_classes=0
        )
        self.backbone = MaskedVisionTransformerTIMM(vit)
        self.embed = nn.Linear(WIDTH, DECODER_WIDTH)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=(SIZE // PATCH) ** 2, embed_dim=DECODER_WIDTH, depth=2, num_heads=3
        )
        self.head = nn.Linear(DECODER_WIDTH, PATCH * PATCH * 3)

    def forward(self, images, weights):
        """Mean squared error of the masked patches of normalised images `[B, 3, H, W]`."""
        split = sample_patches(weights, mask_ratio=0.45, throw_ratio=0.40)  # FAMT
        idx_keep, idx_mask = F.pad(1 + split.visible, (1, 0)), 1 + split.masked  # FAMT
        seen = self.embed(self.backbone.encode(images, idx_keep=idx_keep))
        tokens = seen.new_zeros(len(seen), self.decoder.sequence_length, DECODER_WIDTH)
        tokens = utils.set_at_index(tokens, idx_keep, seen)
        tokens = self.decoder(tokens, idx_mask, torch.cat([idx_keep, idx_mask], 1))  # FAMT
        predicted = self.head(tokens[:, idx_keep.shape[1] :])  # FAMT
        target = utils.get_at_index(utils.patchify(images, PATCH), idx_mask - 1)
        return (predicted - target).square().mean()


def main(steps=30, batch_size=16):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(steps):
        crops = random_crops(SIZE, batch_size)
        images = normalise_images(crops)
        freq = pixel_frequency(crops.permute(0, 3, 1, 2) / 255, SIZE // PATCH).flatten(1)  # FAMT
        attention = attention_scores(last_attention(model.backbone.vit, images))  # FAMT
        loss = model(images, patch_weights({"f": freq, "a": attention}, {"f": 0.25}))  # FAMT
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
