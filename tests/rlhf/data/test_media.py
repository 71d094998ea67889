"""Decoding: what is accepted comes out exact, what is refused says why and with which status."""

import base64
import contextlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from rlhf.data import media as images
from rlhf.data.media import (
    ImageError,
    ImageTooLarge,
    UnreadableImage,
    UnsupportedImage,
    check_array,
    decode_base64_image,
    decode_image,
    encode_base64,
    encode_png,
    picture_file,
)
from tests.rlhf.rewards.pictures import chunk, damaged_files, exif, file_of, png, sixteen_bits


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_png_round_trip_is_exact_and_writable(picture):
    decoded = decode_image(encode_png(picture))
    assert decoded.dtype == np.uint8 and decoded.flags.writeable and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, picture)


def test_lossless_webp_and_jpeg(picture):
    np.testing.assert_array_equal(decode_image(file_of(Image.fromarray(picture), "WEBP", lossless=True)), picture)
    flat = np.full((16, 24, 3), (200, 30, 90), np.uint8)
    assert np.abs(decode_image(file_of(Image.fromarray(flat), "JPEG", quality=95)).astype(int) - flat).max() <= 3


def test_base64_with_and_without_data_url(picture):
    text = encode_base64(picture)
    np.testing.assert_array_equal(decode_base64_image(text), picture)
    np.testing.assert_array_equal(decode_base64_image(f"data:image/png;base64,{text}"), picture)
    with pytest.raises(UnreadableImage, match="not base64"):
        decode_base64_image("what is this?")


def test_transparency_is_laid_on_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = 255, 0, 0, 255
    rgba[1, 1] = 0, 0, 0, 128
    decoded = decode_image(file_of(Image.fromarray(rgba), "PNG"))
    assert decoded[0, 0].tolist() == [255, 0, 0]
    assert decoded[0, 1].tolist() == [255, 255, 255]
    assert decoded[1, 1].tolist() == [127, 127, 127]


def test_palette_transparency_is_laid_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert decode_image(file_of(image, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(picture, orientation):
    decoded = decode_image(file_of(Image.fromarray(picture), "PNG", exif=exif(orientation)))
    upright = {
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, k=-1),
        7: picture[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(picture),
    }
    np.testing.assert_array_equal(decoded, upright.get(orientation, picture))  # 0 and 9 say nothing


def test_cmyk_is_converted():
    ink = {(255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0), (0, 0, 0, 0): (255, 255, 255)}
    for cmyk, rgb in ink.items():
        decoded = decode_image(file_of(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=95))
        assert np.abs(decoded.astype(int) - rgb).max() <= 3


def test_the_content_decides_what_it_is(picture):
    text = encode_base64(picture)
    np.testing.assert_array_equal(decode_base64_image(f"data:image/gif;base64,{text}"), picture)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(picture, format):
    with pytest.raises(UnsupportedImage, match=format) as caught:
        decode_image(file_of(Image.fromarray(picture), format))
    assert caught.value.status == 415


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animation_is_refused(picture, format):
    frames = [Image.fromarray(picture), Image.fromarray(255 - picture)]
    with pytest.raises(UnsupportedImage, match="animated"):
        decode_image(file_of(frames[0], format, save_all=True, append_images=frames[1:], duration=100))


def test_of_a_phones_several_pictures_in_one_jpeg_the_first_is_read(picture):
    first, second = Image.fromarray(picture), Image.fromarray(255 - picture)
    alone = decode_image(file_of(first, "JPEG"))
    np.testing.assert_array_equal(decode_image(file_of(first, "MPO", save_all=True, append_images=[second])), alone)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as the module does itself, where pytest does not reset it
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_broken_metadata_is_no_broken_picture(picture, format):
    """An EXIF directory that promises more than there is, of which Pillow warns; what it says before that counts."""
    directory = struct.pack("<HHHLHH", 3, 0x0112, 3, 1, 6, 0)
    data = file_of(Image.fromarray(picture), format, exif=b"Exif\0\0II*\0" + struct.pack("<L", 8) + directory)
    assert decode_image(data).shape[:2] == picture.shape[1::-1], "turned upright"


def test_a_name_in_another_unicode_normal_form_is_told(tmp_path, picture):
    decomposed, composed = "cafe\u0301/a.png", "caf\u00e9/a.png"
    (tmp_path / decomposed).parent.mkdir()
    (tmp_path / decomposed).write_bytes(encode_png(picture))
    assert not isinstance(picture_file(decomposed, tmp_path), tuple)
    what, remedy = picture_file(composed, tmp_path)
    assert what == (
        f"{composed!r} does not exist, but {decomposed!r} does, whose letters are encoded in another Unicode normal form"
    )
    assert "write the name as the folder has it" in remedy
    what, _ = picture_file("other/a.png", tmp_path)
    assert what == "'other/a.png' does not exist"


@pytest.mark.parametrize("data", sixteen_bits(), ids=["gray", "RGB", "gray and alpha", "RGB and alpha"])
def test_sixteen_bit_is_refused(data):
    with pytest.raises(UnsupportedImage, match="8 bits"):
        decode_image(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.98])
def test_truncated_files_are_refused(format, kept):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(noise), format)
    with pytest.raises(UnreadableImage):
        decode_image(data[: int(len(data) * kept)])


def test_damaged_png_checksum_is_refused(picture):
    data = bytearray(encode_png(picture))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    with pytest.raises(UnreadableImage):
        decode_image(bytes(data))


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_garbage_is_unreadable(data):
    with pytest.raises(UnreadableImage) as caught:
        decode_image(data)
    assert caught.value.status == 400


def test_too_many_bytes():
    with pytest.raises(ImageTooLarge, match="32 MiB") as caught:
        decode_image(b"\x89PNG\r\n\x1a\n" + bytes(images.MAX_BYTES))
    assert caught.value.status == 413
    with pytest.raises(ImageTooLarge):
        decode_base64_image("A" * (images.MAX_BYTES // 3 * 4 + 10_000))


@pytest.mark.parametrize("size", [(8000, 5001), (200_000, 200_000)])
def test_too_many_pixels_are_refused_on_the_header(size):
    with pytest.raises(ImageTooLarge):
        decode_image(png(*size))


def test_forty_megapixels_pass_the_header_check():
    with pytest.raises(UnreadableImage):  # no pixels behind the header, but the size itself is fine
        decode_image(png(8000, 5000))


@settings(max_examples=500, derandomize=True, deadline=None, database=None)
@given(data=damaged_files())
def test_a_damaged_file_is_a_picture_or_an_image_error(data):
    with contextlib.suppress(ImageError):
        check_array(decode_image(data))


def test_every_prefix_of_a_file_is_an_image_error():
    data = file_of(Image.fromarray(np.zeros((5, 5, 3), np.uint8)), "JPEG")
    for length in range(0, len(data) - 2, 7):
        with pytest.raises(ImageError):
            decode_image(data[:length])


def test_text_bomb_is_refused(picture):
    """A compressed text chunk that unfolds to 100 MiB must not be unfolded into memory silently."""
    data = encode_png(picture)
    bomb = chunk(b"zTXt", b"k\x00\x00" + zlib.compress(bytes(100 * 2**20)))
    with pytest.raises(ImageError):
        decode_image(data[:33] + bomb + data[33:])


def test_base64_of_a_text_is_not_an_image():
    with pytest.raises(UnreadableImage, match="first bytes"):
        decode_base64_image(base64.b64encode(b"no picture").decode())
