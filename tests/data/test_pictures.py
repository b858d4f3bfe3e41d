"""Pictures of every mode and format: the right pixels, or one reason why not."""

import contextlib
import io
import os
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest

from diffusion_tf.data.fitting import read_picture
from diffusion_tf.data.pictures import MAX_PIXELS, decode_picture, extensions
from diffusion_tf.errors import ConfigError, InputError

RAMP = np.linspace(0, 65535, 64).astype(np.uint16)
GREYS = np.round(RAMP / 257).astype(np.uint8)
COLOURS = np.asarray(
    PIL.Image.fromarray(np.random.RandomState(0).randint(256, size=(3, 4, 3)).astype(np.uint8)).resize((12, 9))
)
LUMA = COLOURS @ [0.299, 0.587, 0.114]


def encode(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(row, bits, colour_type, *chunks, width=None, height=1):
    """A PNG of one row of bytes; `width` and `height` are what its header claims."""
    header = struct.pack(">IIBBBBB", width or len(row) * 8 // bits, height, bits, colour_type, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" + bytes(row)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + data + chunk(b"IEND", b"")


def tiff(samples, bits, **tags):
    """A TIFF of one row of grey samples, with some tags by their name in the format."""
    numbers = {"PhotometricInterpretation": 262, "SampleFormat": 339}
    values = {256: len(samples) * 8 // bits, 257: 1, 258: bits, 259: 1, 262: 1, 277: 1, 278: 1, 279: len(samples)}
    values |= {numbers[name]: value for name, value in tags.items()}
    values[273] = 8 + 2 + 12 * (len(values) + 1) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(values.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4) + bytes(samples)


@pytest.mark.parametrize(
    "encoded",
    [
        encode(np.tile(RAMP, (64, 1))),
        encode(np.tile(RAMP, (64, 1)), "TIFF"),
        encode(np.tile(RAMP, (64, 1)), "TIFF", compression="tiff_lzw"),
        encode(PIL.Image.frombytes("I;16B", (64, 64), np.tile(RAMP, (64, 1)).astype(">u2").tobytes()), "TIFF"),
        encode(np.tile(RAMP, (64, 1)), "JPEG2000"),
        b"P5 64 64 65535\n" + np.tile(RAMP, (64, 1)).astype(">u2").tobytes(),
    ],
    ids=["PNG", "TIFF", "compressed TIFF", "big-endian TIFF", "JPEG 2000", "PGM"],
)
def test_16_bit_grey_is_scaled(encoded):
    np.testing.assert_array_equal(decode_picture(encoded, 1), np.tile(GREYS, (64, 1))[..., None])
    np.testing.assert_array_equal(decode_picture(encoded, 3), np.tile(GREYS, (64, 1))[..., None].repeat(3, -1))


def test_other_depths_are_scaled_to_their_white():
    np.testing.assert_array_equal(decode_picture(b"P5 3 1 15\n\0\7\17", 1), [[[0], [119], [255]]])
    np.testing.assert_array_equal(decode_picture(b"P5 2 1 1000\n\1\xf4\3\xe8", 1), [[[128], [255]]])
    np.testing.assert_array_equal(decode_picture(b"P1 3 1\n1 0 1", 1), [[[0], [255], [0]]])
    np.testing.assert_array_equal(decode_picture(png([0b00011011], 2, 0), 1), [[[0], [85], [170], [255]]])
    wide = png([0, 0, 128, 9, 255, 255], 16, 2, width=1)  # colours keep their upper bytes
    np.testing.assert_array_equal(decode_picture(wide, 3), [[[0, 128, 255]]])


def test_palettes_are_looked_up():
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    picture = PIL.Image.fromarray(indices, "P")
    picture.putpalette([255 - i // 3 for i in range(768)])
    for file_format in ("PNG", "GIF", "TIFF", "BMP"):
        np.testing.assert_array_equal(decode_picture(encode(picture, file_format), 1)[..., 0], 255 - indices)
    palette = chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 50, 7, 8, 9, 0, 255, 0]))
    half = decode_picture(png([0b00011011], 2, 3, palette, chunk(b"tRNS", b"\xff\x80\0")), 3)
    np.testing.assert_array_equal(half, [[[10, 20, 30], [227, 177, 152], [255, 255, 255], [0, 255, 0]]])


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_transparent_parts_show_white(file_format):
    alpha = np.linspace(0, 255, 108).round().reshape(9, 12, 1)
    exact = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    encoded = encode(np.dstack([COLOURS, alpha.astype(np.uint8)]), file_format, **exact)
    wanted = (COLOURS * alpha + 255 * (255 - alpha)) / 255
    np.testing.assert_allclose(decode_picture(encoded, 3), wanted, atol=0.51)
    np.testing.assert_allclose(decode_picture(encoded, 1)[..., 0], wanted @ [0.299, 0.587, 0.114], atol=1.01)
    np.testing.assert_array_equal(decode_picture(encoded, 4)[..., 3:], alpha)


@pytest.mark.parametrize(
    ("encoded", "wanted"),
    [
        (png([0, 0, 3, 232, 128, 0], 16, 0, chunk(b"tRNS", struct.pack(">H", 1000))), [0, 255, 128]),
        (png([0b00011011], 2, 0, chunk(b"tRNS", b"\0\1")), [0, 255, 170, 255]),
        (png([0b01000000], 1, 0, chunk(b"tRNS", b"\0\0"), width=2), [255, 255]),
        (png([10, 20, 20, 40, 50, 60], 8, 2, chunk(b"tRNS", struct.pack(">HHH", 10, 20, 20)), width=2), [255, 48]),
        (encode(np.array([[[7, 0], [8, 255]]], np.uint8)), [255, 8]),
    ],
    ids=["16-bit grey", "2-bit grey", "1-bit grey", "RGB", "LA"],
)
def test_a_transparent_level_or_colour_shows_white(encoded, wanted):
    np.testing.assert_array_equal(decode_picture(encoded, 1)[0, :, 0], wanted)


def test_grey_and_colour_become_each_other():
    np.testing.assert_allclose(decode_picture(encode(COLOURS), 1)[..., 0], LUMA, atol=0.51)
    grey = LUMA.round().astype(np.uint8)
    np.testing.assert_array_equal(decode_picture(encode(grey), 3), grey[..., None].repeat(3, -1))
    opaque = decode_picture(encode(COLOURS), 4)
    np.testing.assert_array_equal(opaque, np.dstack([COLOURS, np.full((9, 12), 255, np.uint8)]))
    with pytest.raises(ConfigError, match="channels=2: pictures have 1, 3 or 4"):
        decode_picture(encode(COLOURS), 2)


@pytest.mark.parametrize(("mode", "file_format"), [("CMYK", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", "TIFF")])
def test_other_colour_spaces_become_rgb(mode, file_format):
    smooth = PIL.Image.fromarray(COLOURS).resize((96, 72)).convert(mode)
    options = {"quality": 100, "subsampling": 0} if file_format == "JPEG" else {}
    decoded = decode_picture(encode(smooth, file_format, **options), 3)
    np.testing.assert_allclose(decoded.astype(int), np.asarray(smooth.convert("RGB")), atol=6)
    if mode == "CMYK":  # the formula itself: ink C leaves 1 - C of the red, and ink K dims all
        cyan, black = PIL.Image.new("CMYK", (1, 1), (255, 0, 0, 0)), PIL.Image.new("CMYK", (1, 1), (0, 0, 0, 255))
        assert decode_picture(encode(cyan, "TIFF"), 3).tolist() == [[[0, 255, 255]]]
        assert decode_picture(encode(black, "TIFF"), 3).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_pictures_are_turned_upright(file_format):
    turned = {  # what the EXIF standard says of the 0th row and 0th column
        1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
        5: lambda x: x.T, 6: lambda x: x.T[:, ::-1], 7: lambda x: x.T[::-1, ::-1], 8: lambda x: x.T[::-1],
    }  # fmt: skip
    image = np.arange(0, 180, 30, dtype=np.uint8).reshape(2, 3)
    for orientation, upright in turned.items():
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if file_format == "WEBP" else {}
        encoded = encode(image, file_format, exif=exif, **options)
        np.testing.assert_array_equal(decode_picture(encoded, 1)[..., 0], upright(image))


def test_unreadable_exif_data_turns_nothing():
    for file_format in ("PNG", "WEBP", "JPEG"):
        encoded = encode(COLOURS, file_format, exif=b"Exif\0\0not an EXIF header")
        np.testing.assert_array_equal(decode_picture(encoded, 3), decode_picture(encode(COLOURS, file_format), 3))


def test_the_first_frame_is_read():
    first, second = PIL.Image.new("L", (4, 3), 40), PIL.Image.new("L", (4, 3), 200)
    for file_format in ("GIF", "TIFF", "PNG"):
        encoded = encode(first, file_format, save_all=True, append_images=[second])
        np.testing.assert_array_equal(decode_picture(encoded, 1), np.full((3, 4, 1), 40))


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "it is empty"),
        (b"<html>", r"it is none of .*JPEG.*PNG.*, or its header is damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is none of"),
        (encode(np.ones((4, 4), np.int32), "TIFF"), "its mode is I, of which black and white are not known"),
        (encode(np.ones((4, 4), np.float32), "TIFF"), "its mode is F, of"),
        (encode(PIL.Image.new("LAB", (4, 4)), "TIFF"), "its mode is LAB, of"),
        (tiff([0, 255], 16, PhotometricInterpretation=0), "signed, 12-bit or inverted 16-bit samples"),
        (tiff([0, 1, 255], 12), "signed, 12-bit or inverted 16-bit samples"),
        (tiff([128, 127], 8, SampleFormat=2), "signed, 12-bit or inverted 16-bit samples"),
        (png([0] * 6, 16, 2, chunk(b"tRNS", bytes(6)), width=1), "16-bit samples with one transparent colour"),
        (encode(COLOURS)[:60] + b"\xff" + encode(COLOURS)[61:], "it is damaged: .*checksum"),
        (encode(COLOURS)[:-30], "it is damaged: "),
    ],
)  # fmt: skip
def test_other_pictures_are_refused_with_their_reason(encoded, reason):
    with pytest.raises(InputError, match=reason) as caught:
        decode_picture(encoded, 3)
    assert "\n" not in str(caught.value)


def test_truncated_pictures_are_refused_or_whole():
    for file_format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"):
        encoded = encode(COLOURS, file_format)
        whole = decode_picture(encoded, 3)
        for size in (0, 5, 30, len(encoded) // 2, len(encoded) - 9, len(encoded) - 1):
            try:
                np.testing.assert_array_equal(decode_picture(encoded[:size], 3), whole, str((file_format, size)))
            except InputError:
                continue


def test_a_damaged_tiff_prints_nothing(capfd):
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "group4"):
        picture = PIL.Image.fromarray(COLOURS).convert("1" if compression == "group4" else "RGB")
        encoded = encode(picture, "TIFF", compression=compression)
        for place in range(8, len(encoded), 7):
            with contextlib.suppress(InputError):
                decode_picture(encoded[:place] + b"\xff" + encoded[place + 1 :], 3)
    os.write(2, b"still open")
    assert capfd.readouterr() == ("", "still open")


def test_damaged_pictures_end_in_a_picture_or_a_reason():
    random = np.random.RandomState(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a damaged picture must not warn beside its reason
        for file_format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
            encoded = encode(COLOURS, file_format)
            for _ in range(40):
                damaged = bytearray(encoded)
                for place in random.randint(min(len(damaged), random.choice([64, 10**6])), size=random.choice([1, 4])):
                    damaged[place] = random.randint(256)
                with contextlib.suppress(InputError):
                    pixels = decode_picture(bytes(damaged), 3)
                    assert pixels.dtype == np.uint8 and pixels.shape[2:] == (3,)


@pytest.mark.parametrize(
    "bomb",
    [
        png([0], 1, 0, width=20000, height=8000),
        png([0], 1, 0, width=10000, height=10000),
        png([0], 1, 0, width=2**31 - 1, height=2**31 - 1),
        b"P5 10000 10000 255\n",
    ],
)
def test_a_picture_of_too_many_pixels_is_refused_by_its_header(bomb):
    with pytest.raises(InputError, match=r"it has .* 67,108,864 (pixels|in all)"):
        decode_picture(bomb, 3)
    assert MAX_PIXELS == 67_108_864


def test_a_picture_for_a_run_has_its_size(tmp_path):
    path = str(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(encode(COLOURS))
    np.testing.assert_array_equal(read_picture(path, (9, 12, 3)), COLOURS)
    with pytest.raises(InputError, match=r"cannot read the picture .*a.png \(its size is 12 x 9 .*must be 9 x 12"):
        read_picture(path, (12, 9, 3))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.png").write_bytes(encode(COLOURS, exif=exif))
    assert read_picture(path, (12, 9, 3)).shape == (12, 9, 3)
    (tmp_path / "a.png").write_bytes(png([0], 1, 0, width=8000, height=8000))  # under the limit, and not decoded
    with pytest.raises(InputError, match="its size is 8000 x 8000 pixels, and must be 12 x 9"):
        read_picture(path, (9, 12, 3))


def test_files_that_are_not_readable_are_named(tmp_path):
    (tmp_path / "link.png").symlink_to("nowhere.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    for name, reason in (
        ("link.png", "it is a link to nothing"),
        ("folder.png", "it is not a file"),
        ("none.png", "it does not exist"),
        ("empty.png", "it is empty"),
    ):
        with pytest.raises(InputError, match=rf"cannot read the picture .*{name} \({reason}\)"):
            read_picture(str(tmp_path / name), (9, 12, 3))
    (tmp_path / "caf\udce9.png").write_bytes(encode(COLOURS))  # a name in Latin-1
    np.testing.assert_array_equal(read_picture(str(tmp_path / "caf\udce9.png"), (9, 12, 3)), COLOURS)


def test_extensions_are_those_of_the_formats():
    wanted = ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp"
    assert set(wanted.split()) - {".avif"} <= set(extensions())
