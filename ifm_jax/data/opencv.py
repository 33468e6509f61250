"""OpenCV as it is used here: it says nothing, has no threads of its own and opens no image that would fill memory."""

import os

# As many as PIL takes, with the original's loader: 0.5 GB decoded. OpenCV asks once, when it is loaded.
MOST_PIXELS = 178_956_970
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MOST_PIXELS))

import cv2  # noqa: E402

# Images are small and there is one for every thread: OpenCV's own threads would only be in the way.
cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what it would say is raised

__all__ = ["MOST_PIXELS", "cv2"]
