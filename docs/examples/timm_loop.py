"""Your own training loop around a timm ViT: python docs/examples/timm_loop.py

It predicts masked patches with one linear layer. Only the lines marked FAMT differ from a loop with
a random `order` of all patches that masks the first ones.
"""

import timm
import torch
from photos import random_crops
from torch import nn

from famt.attention import attention_scores, last_attention  # FAMT
from famt.frequency import pixel_frequency  # FAMT
from famt.patches import normalise_images, patchify
from famt.sampling import patch_weights, sample_patches  # FAMT

SIZE, PATCH, WIDTH = 64, 8, 192


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=SIZE, patch_size=PATCH, num_classes=0
        )
        self.mask_token = nn.Parameter(torch.zeros(WIDTH))
        self.head = nn.Linear(WIDTH, PATCH * PATCH * 3)

    def forward(self, images, weights):
        """Mean absolute error of the masked patches of normalised images `[B, 3, H, W]`."""
        split = sample_patches(weights, mask_ratio=0.45, throw_ratio=0.40)  # FAMT
        masked = split.masked  # FAMT
        order = torch.cat([masked, split.visible], 1)  # FAMT
        tokens = self.vit.patch_embed(images)
        tokens = tokens.scatter(1, self._at(masked), self.mask_token.expand(*masked.shape, WIDTH))
        tokens = self.vit._pos_embed(tokens)
        tokens = torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, self._at(order))], 1)
        tokens = self.vit.norm(self.vit.blocks(tokens))
        predicted = self.head(tokens[:, 1 : 1 + masked.shape[1]])
        pixels = patchify(images.permute(0, 2, 3, 1), PATCH)
        target = pixels.gather(1, masked[..., None].expand_as(predicted))
        return (predicted - target).abs().mean()

    def _at(self, index):
        return index[..., None].expand(-1, -1, WIDTH)


def main(steps=30, batch_size=16):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(steps):
        crops = random_crops(SIZE, batch_size)
        images = normalise_images(crops)
        frequency = pixel_frequency(crops.permute(0, 3, 1, 2) / 255, SIZE // PATCH)  # FAMT
        attention = attention_scores(last_attention(model.vit, images))  # FAMT
        signals = {"frequency": frequency.flatten(1), "attention": attention}  # FAMT
        loss = model(images, patch_weights(signals, {"frequency": 0.25}))  # FAMT
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
