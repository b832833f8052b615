"""One image file to one RGB image: found inside of its folder, checked before it is decoded, and told what was done to it.

Pillow decodes. torchvision would bring a second decoder and a binary that is bound to one version of torch, for nothing
that is needed here. Only formats whose decoders run in this process are read: PostScript, for one, starts a program.
Does not know examples, labels or models.
"""

from __future__ import annotations

import io
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.data.files import beginning, missing
from weft.errors import DataError, ImageError, MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FORMATS", "MAX_BYTES", "MAX_PIXELS", "Opened", "inside", "open_image", "read_image"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 64_000_000
"""Of one image; more is refused by its header, before anything is decoded."""

MAX_BYTES = 256 * 2**20
"""Of one image file."""

_LFS = b"version https://git-lfs.github.com/spec/"
_FOREIGN = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, MemoryError,
            RuntimeError, NotImplementedError, struct.error, zlib.error)  # fmt: skip
"""What Pillow's decoders raise for files that are not what they say."""


@dataclass(frozen=True)
class Opened:
    """An image, and what had to be done to it.

    Attributes:
        image: mode RGB, upright, decoded.
        remarks: such as ``"animated: its first frame"``; empty for most.
    """

    image: Image
    remarks: tuple[str, ...] = ()


def open_image(source: Any, *, root: str | Path | None = None, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode one image to RGB; see `read_image`, which also says what was done to it."""
    return read_image(source, root=root, max_pixels=max_pixels).image


def read_image(source: Any, *, root: str | Path | None = None, max_pixels: int = MAX_PIXELS) -> Opened:
    """Decode one image to RGB.

    It is turned upright as its EXIF data say, of an animation the first frame is taken, transparent pixels are laid over
    white, 16 bits a channel become 8, CMYK and palettes become RGB.

    Args:
        source: a path, bytes of a file, a mapping ``{"bytes", "path"}`` as data sets of the hub have it, or an image of
            Pillow.
        root: a folder that the path has to stay in; None: any path.
        max_pixels: more are refused before decoding.

    Raises:
        ImageError: no such file, outside of the folder, empty, damaged, cut off, too large, of a format that is not
            read; says which.
        MissingDependencyError: Pillow is not installed.
    """
    pillow, ops = _pillow()
    if isinstance(source, pillow.Image):
        _check_size("the image", source.size, max_pixels)
        return _in_rgb("the image", source, ops, [])
    name, content = _content(source, root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oddities of a file that can be read all the same
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        try:
            image = pillow.open(io.BytesIO(content), formats=FORMATS)
        except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
            raise ImageError(f"{name}: {error}; an image has at most {max_pixels:,} pixels here") from error
        except pillow.UnidentifiedImageError as error:
            raise ImageError(
                f"{name}: no image in a known format; it begins with {content[:16]!r}, expected one of {', '.join(FORMATS)}"
            ) from error
        except _FOREIGN as error:
            raise ImageError(f"{name}: damaged: {_reason(error)}") from error
        _check_size(name, image.size, max_pixels)
        try:
            animated = getattr(image, "n_frames", 1) > 1 and image.format != "MPO"
            image.load()
        except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
            raise ImageError(f"{name}: {error}; an image has at most {max_pixels:,} pixels here") from error
        except _FOREIGN as error:
            raise ImageError(f"{name}: damaged or cut off: {_reason(error)}") from error
        return _in_rgb(name, image, ops, ["animated: its first frame"] if animated else [])


def inside(root: str | Path, name: str) -> Path:
    """The file of a name that data give, if it is in the folder.

    Raises:
        ImageError: an absolute name, one with ``..``, a link out of the folder, an address of the web.
        DataError: the folder is not there.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder of images; give the one that the data's paths begin in (--images DIR)"
        )
    if "://" in name[:12] or name.startswith("data:"):
        raise ImageError(f"{beginning(name)}: an address, and nothing is downloaded; save the image and give its path")
    if not name.strip() or "\0" in name:
        raise ImageError(f"{beginning(name)}: no path of an image")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ImageError(
            f"{name}: leads out of {folder}; expected a path inside of it (--images DIR chooses the folder)"
        )
    found = folder / path
    try:
        real = found.resolve()
        if not real.is_relative_to(folder.resolve()):
            raise ImageError(f"{name}: a link that leads out of {folder}; copy the file there")
    except (OSError, RuntimeError) as error:
        raise ImageError(f"{name}: can't be followed: {error}") from error
    return found


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingDependencyError("images need Pillow; pip install 'weft[vision]', or pip install pillow") from error
    return Image, ImageOps


def _content(source: Any, root: str | Path | None) -> tuple[str, bytes]:
    """The name for messages and the bytes of a file."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes | bytearray | memoryview):
        content, name = bytes(source), "the image's bytes"
    elif isinstance(source, str | Path):
        path = Path(source) if root is None else inside(root, str(source))
        content, name = _read(path), str(path)
    else:
        raise ImageError(f"no image: a {type(source).__name__}; expected a path, bytes, or an image of Pillow")
    if not content:
        raise ImageError(f"{name}: empty (0 bytes)")
    if content.startswith(_LFS):
        raise ImageError(f"{name}: a Git LFS pointer, not the image; fetch it with `git lfs pull` in its repository")
    return name, content


def _read(path: Path) -> bytes:
    try:
        if not path.exists():
            raise ImageError(str(missing(path)))
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise ImageError(f"{path}: no file but a {'folder' if stat.S_ISDIR(facts.st_mode) else 'device'}")
        if facts.st_size > MAX_BYTES:
            raise ImageError(f"{path}: {facts.st_size:,} bytes; an image file has at most {MAX_BYTES:,} here")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise ImageError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width} x {height} pixels; expected at least one")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width:,} x {height:,} pixels; at most {max_pixels:,} here, so make it smaller first"
        )


def _in_rgb(name: str, image: Any, ops: Any, remarks: list[str]) -> Opened:
    """Upright and in RGB."""
    try:
        upright = ops.exif_transpose(image)
    except _FOREIGN:  # EXIF data that nobody can read say nothing
        upright = image
    if upright is not image and upright.size != image.size:
        remarks.append("turned upright as its EXIF data say")
    image = upright
    try:
        if image.mode.startswith("I") or image.mode == "F":
            image = _eight_bits(name, image)
            remarks.append("16 bits a channel: 8 of them")
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image, seen = _over_white(image)
            remarks += ["transparent: laid over white"] if seen else []
        elif image.mode == "CMYK":
            remarks.append("CMYK: as RGB")
        return Opened(image if image.mode == "RGB" else image.convert("RGB"), tuple(remarks))
    except ImageError:
        raise
    except _FOREIGN as error:
        raise ImageError(f"{name}: can't become RGB from {image.mode}: {_reason(error)}") from error


def _eight_bits(name: str, image: Any) -> Any:
    import numpy as np

    values = np.asarray(image)
    if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ImageError(
            f"{name}: brightness in {image.mode}, from {values.min()} to {values.max()}; nobody says what is white, so save it with 8 "
            "or 16 bits a channel"
        )
    wide = image.mode.startswith("I;16") or values.max(initial=0) > 255
    return _pillow()[0].fromarray((values >> 8 if wide else values).astype(np.uint8))


def _over_white(image: Any) -> tuple[Any, bool]:
    """The image over white, and whether there was anything to see through."""
    rgba = image.convert("RGBA")
    white = _pillow()[0].new("RGBA", rgba.size, (255, 255, 255, 255))
    white.alpha_composite(rgba)
    return white.convert("RGB"), rgba.getchannel("A").getextrema()[0] < 255


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
