"""The detector: Faster R-CNN architectures, weights in and out, inference.

Faster R-CNN: Ren, He, Girshick, Sun, "Faster R-CNN: Towards Real-Time Object Detection with Region
Proposal Networks", 2015. One foreground class: label 1 is a gun, label 0 the background.
"""

import sys

# OpenVINO and NNCF tell their maker of every use, unless the package that does it is missing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
