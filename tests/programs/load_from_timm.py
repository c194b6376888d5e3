"""Load an encoder by its name in timm: load_from_timm.py <name> <file for its weights>"""

import sys

import torch

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.train.initial import load_initial

name, file = sys.argv[1:]
model = MaskedAutoencoder(MODELS["vit_tiny"])
print(load_initial(model, f"timm:{name}").describe())
torch.save(model.encoder.state_dict(), file)
