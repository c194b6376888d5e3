"""The data plane: tar shards, the score cache, the DALI loader, and masking by scores.

The only package that knows tars, zarr and DALI.
"""

import os

# OpenCV's warnings name no file; the quarantine has the reason.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
