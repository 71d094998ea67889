"""Media files → uint8 arrays: decoding bytes from outside, and bringing a picture to the exact (H, W) that a model works on.

Every picture that enters the system (preprocess, judges over HTTP) comes through `decode_image`: only PNG, JPEG and
WEBP, limits checked on the header before a pixel is decoded, decoder warnings about the picture are errors, metadata dropped,
transparency laid on white. The EXIF orientation is applied first (a phone's photo is stored sideways), then dropped
with the rest.

To a size, `crop` fills the frame and cuts the rest off evenly, `pad` shows all of it on white, `stretch` changes the aspect.
Resampling is Lanczos, as in diffusers' `VaeImageProcessor`.

Left out on purpose: fetching URLs, other formats, animation, 16-bit output, colour profiles (dropped, not applied),
saliency-aware cropping.
"""

import base64
import binascii
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from unicodedata import normalize

import numpy as np
import xxhash
from PIL import ExifTags, Image, UnidentifiedImageError

from rlhf.data.clips import CLIPS, ClipError, content_of, read_clip
from rlhf.errors import Refused
from rlhf.types import CENTRE, Clip, Fit

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 40_000_000
FORMATS = ("PNG", "JPEG", "WEBP")
# Once for the process and for Pillow's own modules only: filters that are swapped around a call are shared by threads,
# and pictures are decoded in several.
warnings.filterwarnings("error", module=r"PIL\b")
for _harmless in ("Corrupt EXIF data", ".*malformed MPO", "Invalid APNG"):  # beside the picture, which is whole
    warnings.filterwarnings("ignore", message=_harmless, module=r"PIL\b")
_WHITE = (255, 255, 255, 255)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what makes the picture upright."""
_PNG = b"\x89PNG\r\n\x1a\n"
_OTHER_FORMATS = {b"GIF8": "GIF", b"BM": "BMP", b"II*\x00": "TIFF", b"MM\x00*": "TIFF", b"ftyp": "HEIC or AVIF"}
_EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"}


class ImageError(Refused):
    """The bytes are not a picture this system reads. `status` is the HTTP status that says the same."""

    status: ClassVar[int] = 400


class UnreadableImage(ImageError):
    """Truncated, corrupt, not base64, empty."""


class ImageTooLarge(ImageError):
    """More than `MAX_BYTES` of file or `MAX_PIXELS` of picture."""

    status: ClassVar[int] = 413


class UnsupportedImage(ImageError):
    """Readable perhaps, but not a still 8-bit PNG, JPEG or WEBP."""

    status: ClassVar[int] = 415


def decode_image(data: bytes) -> np.ndarray:
    """Decode a still PNG, JPEG or WEBP file.

    Returns: uint8 (H, W, 3), RGB, contiguous and writable; transparent pixels are composited on white.
    Raises: ImageTooLarge, UnsupportedImage or UnreadableImage, all of them `ImageError`.
    """
    if not data:
        raise UnreadableImage("the image is empty (0 bytes)")
    if len(data) > MAX_BYTES:
        raise ImageTooLarge(f"the image file has {len(data)} bytes; at most {MAX_BYTES} (32 MiB) are accepted")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image)
            if (
                image.format == "PNG"
            ):  # Pillow stops once it has the pixels; this reads every chunk's checksum up to IEND
                with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
                    again.verify()
            image.load()
            return _to_rgb(image)
    except ImageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageTooLarge(f"the image is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Warning as error:
        raise UnreadableImage(f"the image decoder warned, which is treated as corruption: {error}") from error
    except Exception as error:  # whatever a decoder stumbles over, down to struct.error, is the file's fault
        raise UnreadableImage(f"the image is corrupt or truncated: {error}") from error


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """A picture file of the input that was read and decoded once."""

    path: str | None
    """Absolute; None where the bytes lie in a table."""
    content: str
    """xxh3-128 of its bytes."""
    height: int
    """Pixels of the decoded picture, of a clip in its box."""
    width: int
    clip: Clip | None = None
    """Of a video."""


def picture_file(given: str | bytes, root: Path = Path()) -> PictureFile | tuple[str, str]:
    """What is known of a picture file, given as its bytes or its path from `root`, once it is decoded; or what is wrong with
    it, and the remedy. A path lies, links followed, inside `root`.
    """
    name, path = (f"{given!r} ", str(given)) if isinstance(given, str) else ("", None)
    try:
        if isinstance(given, str):
            file = file_below(given, root)
            if isinstance(file, tuple):
                return file
            path, given = str(file), file.read_bytes()
        height, width = decode_image(given).shape[:2]
    except (OSError, ValueError, RuntimeError) as error:
        return f"{name}cannot be read: {error}", "give a readable file"
    except ImageTooLarge as error:
        return f"{name}is too large: {error}", "scale it down"
    except UnsupportedImage as error:
        return f"{name}is of a kind that is not read: {error}", "save it as a still 8-bit PNG, JPEG or WEBP"
    except ImageError as error:
        return f"{name}is unreadable: {error}", "replace the file"
    return PictureFile(path=path, content=xxhash.xxh3_128_hexdigest(given), height=height, width=width)


def file_below(given: str, root: Path) -> Path | tuple[str, str]:
    """The file at a path from `root` that lies, links followed, inside it; or what is wrong with the path, and the remedy."""
    name, root = f"{given!r} ", root.resolve()
    file = (root / given).resolve()
    if not file.is_relative_to(root):
        remedy = "move the picture into that folder, without links out of it"
        return f"{name}lies outside the data root {root}", remedy
    if not file.is_file():
        if other := _in_another_form(root, given):
            what = f"does not exist, but {str(other)!r} does, whose letters are encoded in another Unicode normal form"
            return f"{name}{what}", "write the name as the folder has it, or rename the file"
        what = "is no file" if file.exists() else "does not exist"
        return f"{name}{what}", f"put the picture at {file} or mend the path"
    return file


def clip_file(given: str, root: Path, clip: Clip, frames: int) -> PictureFile | tuple[str, str]:
    """What is known of a video file, given by its path from `root`, once so many frames of it are decoded; or what is wrong."""
    name = f"{given!r} "
    if "://" in given:
        return f"{name}is a URL", "videos are never fetched: save it and give its path"
    try:
        file = file_below(given, root)
        if isinstance(file, tuple):
            return file
        if file.suffix.lower() not in CLIPS:
            return f"{name}is a {file.suffix or 'nameless'} file", f"give a video ({', '.join(CLIPS)})"
        height, width = read_clip(file, clip, frames).shape[1:3]
        return PictureFile(path=str(file), content=content_of(file), height=height, width=width, clip=clip)
    except ClipError as error:
        return f"{name}{error}", "leave the row out, or replace the file"
    except (OSError, ValueError) as error:
        return f"{name}cannot be read: {error}", "give a readable file"


def mask_range(data: bytes) -> tuple[int, int] | None:
    """The darkest and the brightest grey of a mask's file, 0 … 255; None where some of it is transparent. Raises ImageError."""
    with Image.open(io.BytesIO(data)) as image:
        if image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
            return None
    grey = decode_image(data).mean(axis=2)
    return int(grey.min()), int(grey.max())


def _in_another_form(root: Path, name: str) -> Path | None:
    """A file below `root` whose path looks the same: é may be one character, or an e and its accent."""
    here = root
    for part in Path(name).parts:
        inside = sorted(here.iterdir()) if here.is_dir() else []
        alike = [one for one in inside if normalize("NFC", one.name) == normalize("NFC", part)]
        if not alike:
            return None
        here = next((one for one in alike if one.name == part), alike[0])
    return here.relative_to(root) if here.is_file() else None


def decode_base64_image(text: str) -> np.ndarray:
    """Decode base64 (a `data:image/…;base64,` prefix is allowed), then the picture. Errors: see `decode_image`."""
    if text.startswith("data:"):
        header, comma, text = text.partition(",")
        if not comma or not header.endswith(";base64"):
            raise UnreadableImage("a data URL must look like data:image/png;base64,…")
    if len(text) > (MAX_BYTES + 2) // 3 * 4 + 1024:
        raise ImageTooLarge(f"the base64 text stands for more than {MAX_BYTES} bytes (32 MiB)")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnreadableImage(f"not base64: {error}") from error
    return decode_image(data)


def encode_png(image: np.ndarray) -> bytes:
    """A PNG file of a uint8 (H, W, 3) array, lossless."""
    check_array(image)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def encode_base64(image: np.ndarray) -> str:
    """`encode_png` as base64 text, the form in which the HTTP routes take pictures."""
    return base64.b64encode(encode_png(image)).decode()


def check_array(image: np.ndarray) -> None:
    """Raise ValueError unless `image` is uint8 (H, W, 3) with H, W ≥ 1."""
    if not isinstance(image, np.ndarray):  # ValueError on purpose: it is a caller's mistake like the next one
        raise ValueError(f"an image must be a numpy array uint8 (H, W, 3), not {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an image must be uint8 (H, W, 3), not {image.dtype} {image.shape}")


def _unidentified(data: bytes) -> ImageError:
    """Why Pillow takes a file for none of the formats, by its first bytes."""
    if data.startswith((_PNG, b"\xff\xd8\xff")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return UnreadableImage("the image header cannot be read; send a valid PNG, JPEG or WEBP file")
    if data.startswith(b"version https://git-lfs."):
        return UnreadableImage("the file is a Git LFS pointer, not the picture: run `git lfs pull` where it lies")
    for signature, name in _OTHER_FORMATS.items():
        if data.startswith(signature) or (name == "HEIC or AVIF" and data[4:8] == signature):
            return UnsupportedImage(f"the image is a {name} file; send PNG, JPEG or WEBP")
    return UnreadableImage("the image is not a PNG, JPEG or WEBP file (by its first bytes)")


def _check_header(image: Image.Image) -> None:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ImageTooLarge(f"the image has {image.width}×{image.height} = {pixels} pixels; at most {MAX_PIXELS}")
    # A phone's MPO is a JPEG with small pictures behind it, of which the first is the photo.
    if image.format != "MPO" and (getattr(image, "is_animated", False) or getattr(image, "n_frames", 1) > 1):
        raise UnsupportedImage(
            f"the image is animated ({getattr(image, 'n_frames', '?')} frames); send a still picture"
        )
    # Pillow calls a 16-bit RGB file "RGB" and drops the lower byte: only what it unpacks says so.
    if image.mode not in _EIGHT_BIT or any(";16" in str(tile.args) for tile in getattr(image, "tile", ())):
        raise UnsupportedImage(f"the image has more than 8 bits per channel (mode {image.mode}); send 8")


def _to_rgb(image: Image.Image) -> np.ndarray:
    # Not ImageOps.exif_transpose, which also writes the EXIF anew and fails over tags that have nothing to do with it.
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    still = image if turn is None else image.transpose(turn)
    if "A" in still.getbands() or "a" in still.getbands() or "transparency" in still.info:
        rgba = still.convert("RGBA")
        still = Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba)
    return np.array(still.convert("RGB"), dtype=np.uint8)


# --- to a size ---------------------------------------------------------------------------------------------------------


def fit_image(image: np.ndarray, height: int, width: int, fit: Fit, crop: tuple[float, float] = CENTRE) -> np.ndarray:
    """uint8 (H, W, 3) of a uint8 picture of any size; one that has the size already is returned unchanged.

    `crop`: where a "crop" lies in what it may cut off, (down, across), each 0 … 1.
    """
    if image.shape[:2] == (height, width):
        return image
    size, box, picture = (width, height), None, Image.fromarray(image)
    scale = (max if fit == "crop" else min)(width / picture.width, height / picture.height)
    if fit == "crop":
        w, h = width / scale, height / scale
        top, left = (picture.height - h) * crop[0], (picture.width - w) * crop[1]
        box = (max(left, 0.0), max(top, 0.0), min(left + w, picture.width), min(top + h, picture.height))
    elif fit == "pad":
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    elif fit != "stretch":
        raise ValueError(f"data.fit = {fit!r}; use crop, pad or stretch")
    fitted = np.array(picture.resize(size, Image.Resampling.LANCZOS, box=box), dtype=np.uint8)
    if fit != "pad":
        return fitted
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    canvas[top : top + size[1], left : left + size[0]] = fitted
    return canvas
