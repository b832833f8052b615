"""Images of every kind that files bring: decoded as they are meant, or refused with a reason."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from weft.data.images import inside, open_image, read_image
from weft.data.transforms import AUGMENTATIONS, ImageTransform, augmented
from weft.errors import DataError, ImageError


def draws():
    return np.random.default_rng(np.random.randint(2**31))


def noise(shape):
    return draws().integers(0, 256, shape, dtype=np.uint8)


def stored(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pixels(image):
    return np.asarray(image)


def test_rgb_comes_back_exactly(tmp_path):
    values = noise((9, 7, 3))
    path = tmp_path / "a.png"
    path.write_bytes(stored(Image.fromarray(values)))
    for source in (path, str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, Image.open(path)):
        opened = read_image(source)
        assert (pixels(opened.image) == values).all()
        assert opened.image.mode == "RGB"
        assert opened.remarks == ()


def test_transparent_pixels_lie_over_white():
    values = noise((5, 5, 4))
    values[0, 0, 3], values[1, 1, 3] = 0, 255
    found = read_image(stored(Image.fromarray(values)))
    assert pixels(found.image)[0, 0].tolist() == [255, 255, 255]
    assert pixels(found.image)[1, 1].tolist() == values[1, 1, :3].tolist()
    assert "transparent" in found.remarks[0]
    expected = 255 + (values[..., :3].astype(float) - 255) * values[..., 3:] / 255
    assert np.abs(pixels(found.image) - expected).max() <= 1


def test_a_palette_is_looked_up_and_its_transparent_colour_is_white():
    values = noise((8, 8, 3)) // 64 * 64
    palette = Image.fromarray(values).convert("P", palette=Image.Palette.ADAPTIVE, colors=200)
    assert (pixels(open_image(stored(palette))) == pixels(palette.convert("RGB"))).all()
    first = palette.getpixel((0, 0))
    found = read_image(stored(palette, transparency=first))
    assert pixels(found.image)[0, 0].tolist() == [255, 255, 255]
    assert found.remarks


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode):
    image = Image.fromarray(noise((6, 6, 3))).convert(mode if mode not in ("LAB", "HSV") else "RGB")
    form = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    assert open_image(stored(image, form)).mode == "RGB"


def test_sixteen_bits_keep_their_brightness():
    wide = draws().integers(0, 65536, (6, 6)).astype(np.uint16)
    found = read_image(stored(Image.fromarray(wide)))
    assert np.abs(pixels(found.image)[..., 0].astype(int) - (wide >> 8)).max() == 0
    assert "16 bits" in found.remarks[0]


def test_brightness_without_a_white_is_refused():
    with pytest.raises(ImageError, match="nobody says what is white"):
        open_image(stored(Image.fromarray(draws().normal(size=(4, 4)).astype(np.float32)), "TIFF"))


def test_exif_turns_the_image():
    values = noise((4, 9, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = read_image(stored(Image.fromarray(values), exif=exif))
    assert (pixels(found.image) == np.rot90(values, -1)).all()
    assert found.remarks == ("turned upright as its EXIF data say",)


def test_damaged_exif_is_no_reason_to_lose_the_image():
    content = stored(Image.fromarray(noise((8, 8, 3))), "JPEG")
    broken = b"Exif\0\0II*\0\xff\xff\xff\xff" + os.urandom(20)
    segment = b"\xff\xe1" + struct.pack(">H", len(broken) + 2) + broken
    assert open_image(content[:2] + segment + content[2:]).size == (8, 8)


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(noise((6, 6, 3))).quantize(64) for _ in range(3)]
    found = read_image(stored(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (pixels(found.image) == pixels(frames[0].convert("RGB"))).all()
    assert found.remarks == ("animated: its first frame",)


def bomb(width, height):
    """A PNG of a few bytes that says it is huge."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9_000, 11_000, 20_000, 60_000])
def test_bombs_are_refused_by_their_header(side):
    with pytest.raises(ImageError, match="pixels"):
        open_image(bomb(side, side))


def test_what_is_no_image_is_said():
    for content, words in ((b"", "empty"), (b"hello", "known format"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known format"),
                           (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS")):  # fmt: skip
        with pytest.raises(ImageError, match=words):
            open_image(content)
    with pytest.raises(ImageError, match="expected a path"):
        open_image(7)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_cut_and_changed_files_are_refused_or_read(form):
    draw = draws()
    content = stored(Image.fromarray(noise((40, 40, 3))), form)
    for end in draw.integers(0, len(content) - 1, 12):
        refused_or_read(content[:end])
    for _ in range(12):
        changed = bytearray(content)
        for at in draw.integers(0, len(content), 4):
            changed[at] = draw.integers(256)
        refused_or_read(bytes(changed))
    with pytest.raises(ImageError):
        open_image(content[: len(content) // 2])


def refused_or_read(content):
    with contextlib.suppress(ImageError):
        assert open_image(content).mode == "RGB"


def test_paths_stay_in_their_folder(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    image = stored(Image.fromarray(noise((3, 3, 3))))
    (root / "sub" / "in.png").write_bytes(image)
    (tmp_path / "out.png").write_bytes(image)
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "fine.png").symlink_to(root / "sub" / "in.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    assert open_image("sub/in.png", root=root).size == (3, 3)
    assert open_image("fine.png", root=root).size == (3, 3)
    for name in ("../out.png", str(tmp_path / "out.png"), "link.png", "sub/../../out.png", "", " ", "a\0b", "sub",
                 "http://example.org/a.png", "data:image/png;base64,AAAA", "no.png", "loop.png", "x" * 5000):  # fmt: skip
        with pytest.raises(ImageError):
            open_image(name, root=root)
    with pytest.raises(DataError, match="--images"):
        inside(tmp_path / "nowhere", "a.png")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="device"):
        open_image(tmp_path / "pipe.png")


def test_a_transform_is_arithmetic_on_pixels():
    values = noise((8, 8, 3))
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    found = ImageTransform(8, mean, std)(Image.fromarray(values))
    expected = (values.astype(np.float64) / 255 - mean) / std
    assert found.shape == (3, 8, 8)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("size", [(3, 3), (50, 3), (3, 50), (1, 1), (64, 48)])
def test_every_shape_fits(fit, size):
    found = ImageTransform((8, 12), fit=fit)(Image.fromarray(noise((size[1], size[0], 3))))
    assert found.shape == (3, 8, 12)
    assert bool(torch.isfinite(found).all())


def test_augmentation_is_a_function_of_its_seed():
    image = Image.fromarray(noise((16, 20, 3)))
    transform = ImageTransform(16, augment=AUGMENTATIONS)
    several = [transform(image, seed) for seed in range(6)]
    assert all(bool((transform(image, seed) == several[seed]).all()) for seed in range(6))
    assert any(bool((several[0] != other).any()) for other in several[1:])
    assert bool((transform(image) == ImageTransform(16)(image)).all())
    assert {pixels(augmented(image, ["flip"], seed)).tobytes() for seed in range(40)} == {
        pixels(image).tobytes(), np.ascontiguousarray(pixels(image)[:, ::-1]).tobytes()
    }  # fmt: skip


def test_wrong_settings_are_refused():
    for settings in (
        {"augment": ["flop"]},
        {"fit": "squeeze"},
        {"resample": "magic"},
        {"std": (1, 0, 1)},
        {"mean": (1,)},
    ):
        with pytest.raises(DataError):
            ImageTransform(**{"size": 8, **settings})
    with pytest.raises(DataError):
        ImageTransform(0)
