"""OpenCV, configured: it logs nothing, starts no threads and opens no image that would fill memory."""

import os

# PIL's limit, as in the original's loader: 0.5 GB decoded. OpenCV reads the variable once, when it is loaded.
MOST_PIXELS = 178_956_970
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MOST_PIXELS))

import cv2  # noqa: E402

# Images are small and every thread of ours has one: OpenCV's own threads would only interfere.
cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # its errors are raised instead

__all__ = ["MOST_PIXELS", "cv2"]
