"""Picture files of every kind that comes in from outside, by the names that serve_apps/README.md has for them."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from rlhf.data.media import MAX_BYTES, encode_png

NOISE = np.random.default_rng(1).integers(0, 256, (32, 24, 3), dtype=np.uint8)


def file_of(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(NOISE).convert(mode)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *, depth: int = 8, color: int = 2, rows: bytes = b"") -> bytes:
    """A PNG with this header around whatever rows; color: 0 gray, 2 RGB, 4 gray and alpha, 6 RGB and alpha."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def sixteen_bits() -> Iterator[bytes]:
    for color, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        yield png(4, 4, depth=16, color=color, rows=(b"\0" + b"\x12\x34" * channels * 4) * 4)


def plain() -> Iterator[bytes]:
    for mode in ("L", "1", "P", "LA", "RGBA"):
        yield file_of(noise(mode), "PNG")


def exif(orientation: int) -> bytes:
    """EXIF with an image width of 1/3, which no writer of EXIF accepts, before the orientation that counts."""
    directory = struct.pack("<HHHLL", 2, 0x0100, 5, 1, 38) + struct.pack("<HHLHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0II*\0" + struct.pack("<L", 8) + directory + struct.pack("<LLL", 0, 1, 3)


def turned() -> Iterator[bytes]:
    for format in ("PNG", "JPEG", "WEBP"):
        yield file_of(noise(), format, exif=exif(6))


def cut() -> Iterator[bytes]:
    for format in ("PNG", "JPEG", "WEBP"):
        data = file_of(noise(), format)
        yield data[: len(data) // 2]
    flipped = bytearray(encode_png(NOISE))
    flipped[flipped.index(b"IDAT") + 20] ^= 0xFF
    yield bytes(flipped)


def bad_exif() -> Iterator[bytes]:
    """A directory that announces entries which are not there."""
    for format in ("PNG", "JPEG", "WEBP"):
        yield file_of(noise(), format, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01\0\0\0\x06\0\0\0")


def animated() -> Iterator[bytes]:
    for format in ("PNG", "WEBP"):
        yield file_of(noise(), format, save_all=True, append_images=[Image.fromarray(255 - NOISE)])


KINDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "of one pixel": lambda: iter([file_of(Image.new("RGB", (1, 1)), format) for format in ("PNG", "JPEG", "WEBP")]),
    "a strip of 1×100000": lambda: iter(
        [file_of(Image.new("RGB", (1, 100_000)), "PNG"), file_of(Image.new("RGB", (100_000, 1)), "PNG")]
    ),
    "gray, palette, transparent": plain,
    "CMYK JPEG": lambda: iter([file_of(noise("CMYK"), "JPEG")]),
    "turned by EXIF": turned,
    "with broken EXIF": bad_exif,
    "several pictures in one JPEG, as phones write": lambda: iter(
        [file_of(noise(), "MPO", save_all=True, append_images=[Image.fromarray(255 - NOISE)])]
    ),
    "a JPEG named .png": lambda: iter([file_of(noise(), "JPEG")]),
    "40 megapixels of one colour in a small file": lambda: iter([file_of(Image.new("1", (8000, 5000)), "PNG")]),
    "empty, or no picture": lambda: iter([b"", b"no picture at all", b"\x89PNG\r\n\x1a\n"]),
    "truncated, or with a wrong checksum": cut,
    "header of more than 40 megapixels, whatever is behind it": lambda: iter(
        [png(8000, 5001), png(2**31 - 1, 2**31 - 1)]
    ),
    "more than 32 MiB": lambda: iter([encode_png(NOISE) + bytes(MAX_BYTES)]),
    "a GIF, BMP or TIFF, also when named .png": lambda: (file_of(noise(), format) for format in ("GIF", "BMP", "TIFF")),
    "animated PNG or WEBP": animated,
    "16 bits per channel": sixteen_bits,
}
"""Kind → its files."""


@st.composite
def damaged_files(draw) -> bytes:
    """A valid file with up to four places overwritten, cut out or stuffed: mostly in the header, where decoders branch."""
    data = bytearray(draw(st.sampled_from(_VALID)))
    for _ in range(draw(st.integers(0, 4))):
        end = draw(st.sampled_from([32, 200, len(data)]))
        start = draw(st.integers(0, min(end, len(data)) - 1))
        data[start : start + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data)


_VALID = [
    file_of(noise(mode), format, exif=exif(6))
    for mode, format in [("RGB", "PNG"), ("P", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "WEBP")]
]
