"""Restored patches, and what stands in their place without a model: two baselines, and the error.

Images are float32 [height, width, 3] in [0, 1], a mask is bool [height, width], true where an image
is not known. A baseline reads nothing there.
"""

import cv2
import numpy as np


def with_mean_color(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fills the mask with the mean of the pixels that are known."""
    filled = image.copy()
    filled[mask] = image[~mask].mean(axis=0)
    return filled


def with_neighbors(image: np.ndarray, mask: np.ndarray, radius: int) -> np.ndarray:
    """Fills the mask from its edges inward, by OpenCV's Telea (2004), in 8 bits.

    Args:
        image: the whole image.
        mask: of it.
        radius: of the neighborhood that a pixel is made of, in pixels.
    """
    known = np.where(mask[..., None], 0, np.round(image * 255)).astype(np.uint8)
    filled = cv2.inpaint(known, mask.astype(np.uint8), radius, cv2.INPAINT_TELEA)
    return np.where(mask[..., None], np.float32(filled) / 255, image)


def error(image: np.ndarray, filled: np.ndarray, mask: np.ndarray) -> float:
    """The root of the mean squared error of the masked values, in gray levels of 255."""
    squares = (image[mask].astype(np.float64) - filled[mask]) ** 2
    return float(255 * np.sqrt(squares.mean()))
