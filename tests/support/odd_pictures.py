"""A folder of sixty files as people have them: pictures of every kind, and what lies beside pictures."""

import io
import pathlib

import numpy as np
import PIL.Image

# What a program must say of the folder.
PICTURES, CORRUPT = 54, ("broken/cut.jpg", "broken/text.png")
LEFT_OUT = {"hidden": 2, ".txt": 1, ".zip": 1, "without an extension": 1, "folder linked twice": 1}


def picture(index: int, size: tuple[int, int] = (50, 40)) -> PIL.Image.Image:
    """A smooth RGB picture of (width, height)."""
    coarse = np.random.RandomState(index).randint(0, 256, (5, 6, 3)).astype(np.uint8)
    return PIL.Image.fromarray(coarse).resize(size)


def encoded(image: PIL.Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def write_odd_pictures(folder: pathlib.Path) -> None:
    """Writes PICTURES sound pictures, the CORRUPT ones, and the files that LEFT_OUT counts."""
    for name in ("plain", "kinds", "broken", "with spaces/und Ümläüte 日本"):
        (folder / name).mkdir(parents=True)
    sizes = [(50, 40), (40, 50), (64, 64), (33, 90), (200, 150), (20, 12), (32, 32)]
    formats = ["JPEG", "PNG", "WEBP", "BMP", "GIF"]
    for index in range(35):
        kind = formats[index % len(formats)]
        picture(index, sizes[index % len(sizes)]).save(folder / f"plain/{index:02d}.{kind.lower()}", kind)
    kinds = _kinds()
    for name, content in kinds.items():
        (folder / "kinds" / name).write_bytes(content)
    for index, name in enumerate(("a b.png", "日本 語.jpg", "naïve café.webp", "emoji 🙂.png")):
        picture(60 + index).save(folder / "with spaces/und Ümläüte 日本" / name)
    (folder / "linked.png").symlink_to("plain/01.png")
    (folder / "again").symlink_to("plain")  # a second way to the same folder
    whole = encoded(picture(70), "JPEG")
    (folder / "broken/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "broken/text.png").write_text("no picture")
    (folder / "notes.txt").write_text("no picture")
    (folder / "archive.zip").write_bytes(b"PK")
    (folder / "README").touch()
    (folder / ".DS_Store").touch()
    (folder / "plain/.hidden.png").write_bytes(encoded(picture(71)))


def _kinds() -> dict[str, bytes]:
    """Pictures of kinds that are read in a way of their own."""
    rgb = picture(50)
    alpha = PIL.Image.linear_gradient("L").resize(rgb.size)
    wide = PIL.Image.fromarray(np.linspace(0, 65535, 50 * 40).astype(np.uint16).reshape(40, 50))
    palette = rgb.convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    with_alpha = rgb.copy()
    with_alpha.putalpha(alpha)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    return {
        "grey.png": encoded(rgb.convert("L")),
        "grey.jpg": encoded(rgb.convert("L"), "JPEG"),
        "one bit.png": encoded(rgb.convert("1")),
        "16 bit.png": encoded(wide),
        "palette.png": encoded(palette),
        "palette with transparency.png": encoded(palette, transparency=3),
        "alpha.png": encoded(with_alpha),
        "alpha.webp": encoded(with_alpha, "WEBP", lossless=True),
        "grey alpha.png": encoded(with_alpha.convert("LA")),
        "animated.gif": encoded(rgb, "GIF", save_all=True, append_images=[picture(51), picture(52)]),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "turned.jpg": encoded(rgb, "JPEG", exif=exif),
        "turned.png": encoded(rgb, exif=exif),
        "UPPER.JPG": encoded(rgb, "JPEG"),
    }
