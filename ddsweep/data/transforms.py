"""The transforms in the name of a data set: ``size`` (bicubic) and ``channels`` (grey repeated)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["transform_images"]


def transform_images(images: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """uint8 images ``[N, c, h, w]`` as ``[N, *shape]``, image by image.

    PIL's bicubic filter makes another height or width, without keeping height to width. It rounds to uint8
    and, for smaller images, widens so that no pixel is skipped. After that one channel becomes three equal
    ones.
    """
    if images.shape[1:] == shape:
        return images
    out = np.empty((len(images), *shape), np.uint8)
    height, width = shape[1:]
    if images.shape[2:] == (height, width):
        out[...] = images
        return out
    for i, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        resized = np.asarray(
            Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BICUBIC)
        )
        out[i] = resized if resized.ndim == 2 else resized.transpose(2, 0, 1)
    return out
