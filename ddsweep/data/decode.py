"""One image file: its properties, and its pixels as uint8, decoded once."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ddsweep.data.layout import one_line
from ddsweep.errors import DataError

__all__ = [
    "Box",
    "Look",
    "Shape",
    "decode_files",
    "decode_into",
    "decode_resized",
    "is_image",
    "look",
    "unusable",
]

Shape = tuple[int, int, int]
_GREY = frozenset({"1", "L", "LA", "La"})
_COLOUR = frozenset({"RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"})
_BY_CONTENT = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")
"""Formats that are recognised by the first bytes of a file, under any name."""
_ORIENTATION = 0x0112


class _UnreadableError(Exception):
    """Why an image cannot be used."""


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    """An 8-bit image; any error while it is read becomes an `_UnreadableError`."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.mode not in _GREY | _COLOUR:
                raise _UnreadableError(f"pixel mode {image.mode} is not 8 bits per channel")
            yield image
    except _UnreadableError:
        raise
    except Exception as error:  # decoders raise many types for damaged files: SyntaxError, struct.error
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise _UnreadableError(f"the image cannot be read: {reason}") from error


def _flattened(image: Image.Image) -> tuple[Image.Image, bool]:
    """``image`` with transparent parts laid on white, and whether there were any.

    Otherwise the hidden colour below transparent parts would show.
    """
    if not image.has_transparency_data:
        return image, False
    clear = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    low, _ = clear.getchannel("A").getextrema()
    if low == 255:
        return image, False
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear), True


def is_image(path: Path) -> bool:
    """Whether the content of a file begins as that of an image, under any name."""
    Image.init()
    try:
        with Image.open(path, formats=[name for name in _BY_CONTENT if name in Image.OPEN]):
            return True
    except Exception:  # as above: many types
        return False


# ----------------------------------------------------------------------------------------- looking


class Look(NamedTuple):
    """The properties of one image: (channels, height, width), a digest of its pixels as RGB, and remarks; or
    ``trouble``, the reason why it cannot be used."""

    shape: Shape
    pixels: bytes
    transparent: bool
    animated: bool
    turned: bool
    trouble: str = ""


def unusable(reason: str) -> Look:
    """The properties of an unreadable image."""
    return Look((0, 0, 0), b"", False, False, False, reason)


def look(content: bytes) -> Look:
    """Decode an image and return its properties. Raises nothing: ``trouble`` names a problem."""
    if not content:
        return unusable("the image cannot be read: there are no bytes")
    try:
        with _opened(content) as image:
            channels = 1 if image.mode in _GREY else 3
            flat, transparent = _flattened(image)
            colours = flat if flat.mode == "RGB" else flat.convert("RGB")
            digest = hashlib.blake2b(f"{colours.width}x{colours.height} ".encode(), digest_size=16)
            digest.update(colours.tobytes())
            turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) not in (0, 1)
            shape = (channels, colours.height, colours.width)
            return Look(shape, digest.digest(), transparent, bool(getattr(image, "is_animated", 0)), turned)
    except _UnreadableError as error:
        return unusable(str(error))


# ----------------------------------------------------------------------------------------- decoding


def decode_into(out: npt.NDArray[np.uint8], source: Path | bytes, where: str, *, resize: bool) -> None:
    """Decode into ``out`` [c, h, w]: as grey if c is 1, as RGB if it is 3, transparent parts on white.

    An image of another size is resized by PIL's bicubic filter, without keeping height to width. Raises a
    `DataError` that begins with ``where`` for damage and, without ``resize``, for another size.
    """
    channels, height, width = out.shape
    try:
        with _opened(source) as image:
            flat, _ = _flattened(image)
            mode = "L" if channels == 1 else "RGB"
            flat = flat if flat.mode == mode else flat.convert(mode)
            flat.load()
            if flat.size != (width, height):
                if not resize:
                    raise _UnreadableError(
                        f"the image is {flat.height}x{flat.width} pixels, not {height}x{width} as declared"
                    )
                flat = flat.resize((width, height), Image.Resampling.BICUBIC)
            pixels = np.asarray(flat)
    except _UnreadableError as error:
        raise DataError(f"{where}: {error}") from error
    out[...] = pixels if channels == 1 else pixels.transpose(2, 0, 1)


def decode_files(
    files: Sequence[tuple[int, Path]], shape: Shape, *, resize: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(label, file) pairs to images uint8 [N, c, h, w] and labels int64 [N].

    Raises `DataError` naming the file for a damaged image and, without ``resize``, for another size than
    ``shape``.
    """
    images = np.empty((len(files), *shape), np.uint8)
    for i, (_, path) in enumerate(files):
        decode_into(images[i], path, str(path), resize=resize)
    return images, np.array([label for label, _ in files], np.int64)


# ------------------------------------------------------------------------------------ crops, resized

Box = tuple[int, int, int, int]
"""Left, upper, right, lower, in pixels from 0; right and lower are the first pixels outside."""


def decode_resized(out: npt.NDArray[np.uint8], path: Path, boxes: Sequence[Box | None]) -> None:
    """One image, as RGB, into ``out [len(boxes), 3, h, w]``: the part in each box (None: all of it), resized
    by PIL's bicubic filter, without keeping height to width.

    Raises `DataError` naming the file if it is missing or damaged, and for a box that is empty or reaches
    outside.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing")
    side = (out.shape[3], out.shape[2])
    try:
        with _opened(path) as image:
            pixels = image.convert("RGB")
            for target, box in zip(out, boxes, strict=True):
                if box is not None:
                    left, upper, right, lower = box
                    if not (0 <= left < right <= pixels.width and 0 <= upper < lower <= pixels.height):
                        raise _UnreadableError(
                            f"box x {left + 1} to {right}, y {upper + 1} to {lower} is empty or not "
                            f"inside the image, which is {pixels.width} wide and {pixels.height} high"
                        )
                # Cropped first: resizing with a box would mix in pixels around it.
                part = pixels if box is None else pixels.crop(box)
                target[...] = np.asarray(part.resize(side, Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    except _UnreadableError as error:
        raise DataError(f"{path}: {error}") from error
