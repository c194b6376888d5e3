"""Decode large images with 60 MB of memory left; what it raises is printed."""

import io
import resource
from pathlib import Path

from PIL import Image

from famt.pipeline.scoring.decode import decode


def encode(kind, side, **options):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (10, 200, 30)).save(buffer, kind, **options)
    return buffer.getvalue()


files = [
    encode("JPEG", 6000, progressive=True),
    encode("PNG", 6000),
    encode("WEBP", 6000, quality=1, method=0),
]
decode(encode("PNG", 60), 8)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60_000_000, resource.RLIM_INFINITY))
for data in files:
    try:
        decode(data, 5000)
    except MemoryError:
        print("MemoryError")
