"""Hugging Face's MAE, with FAMT's weights and sampling: python docs/examples/transformers_mae.py

Only the lines marked FAMT differ from a plain `ViTMAEForPreTraining`; its argument `noise` carries
the weights. Thrown patches enter neither encoder nor loss, but the decoder has a token for each.
"""

import torch
from photos import random_crops
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from famt.frequency import pixel_frequency  # FAMT
from famt.patches import normalise_images
from famt.sampling import sample_patches  # FAMT

SIZE, PATCH = 64, 8


def random_masking(sequence, weights):  # FAMT
    split = sample_patches(weights, mask_ratio=0.45, throw_ratio=0.40)  # FAMT
    order = torch.cat([split.visible, split.masked, split.thrown], 1)  # FAMT
    seen = sequence.gather(1, split.visible[..., None].expand(-1, -1, sequence.shape[-1]))  # FAMT
    return seen, torch.zeros_like(weights).scatter(1, split.masked, 1.0), order.argsort(1)  # FAMT


def build():
    config = ViTMAEConfig(
        image_size=SIZE, patch_size=PATCH, hidden_size=192, num_hidden_layers=12,
        num_attention_heads=3, intermediate_size=768, decoder_hidden_size=96,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=3, decoder_intermediate_size=384,
        norm_pix_loss=True,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    model.vit.embeddings.random_masking = random_masking  # FAMT
    return model


def main(steps=30, batch_size=16):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(steps):
        crops = random_crops(SIZE, batch_size)
        weights = pixel_frequency(crops.permute(0, 3, 1, 2) / 255, SIZE // PATCH).flatten(1)  # FAMT
        loss = model(pixel_values=normalise_images(crops), noise=weights**0.25).loss  # FAMT
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
