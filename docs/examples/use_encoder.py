"""Compare photos with an encoder: python use_encoder.py exported first.jpg second.jpg ..."""

import sys

import timm
import torch
from PIL import Image

encoder = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
photos = torch.stack([prepare(Image.open(path).convert("RGB")) for path in sys.argv[2:]])
with torch.no_grad():
    features = torch.nn.functional.normalize(encoder(photos), dim=1)
print(features @ features.T)  # cosine similarity of every pair
