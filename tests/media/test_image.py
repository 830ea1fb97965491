"""Pictures of every kind, by every way in: upright, 8 of 16 bits, one frame, cut before they are scaled."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from dsa_engine.media import image
from dsa_engine.media.preprocess import to_video_tensor
from tests.support.media.files import greys, quadrants, write_video


def from_pillow(path, height, width) -> np.ndarray:
    """By way of `image=Image.open(path)`."""
    with Image.open(path) as picture:
        tensor = to_video_tensor("image", picture, 1, (height, width))[0, 0]
    return (255 * tensor).round().byte().movedim(0, -1).numpy()


def uploaded(path, height, width) -> np.ndarray:
    return image.decode(path.read_bytes(), height, width)


WAYS = [image.read_image, uploaded, from_pillow]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_photo_is_upright(tmp_path, way, value, kind):
    exif = Image.Exif()
    exif[0x0112] = value
    path = tmp_path / f"photo.{kind}"
    Image.fromarray(quadrants(32, 64)).save(path, exif=exif, **({"quality": 95} if kind == "jpg" else {}))
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    assert (way(path, *expected.shape[:2]) == expected).all()
    other = np.abs(way(path, 40, 40).astype(int) - fit(expected, 40, 40))
    assert other.max() <= 1  # scaled before it was turned, so rounded in another order


def fit(pixels, height, width) -> np.ndarray:
    """The middle cut out, then scaled: Pillow's own `ImageOps.fit`."""
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (width, height), Image.Resampling.BICUBIC)).astype(int)


@pytest.mark.parametrize("way", WAYS)
def test_of_16_bits_the_upper_8(tmp_path, way):
    grey = np.arange(0, 2**16, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(grey).save(tmp_path / "grey16.png")
    assert (way(tmp_path / "grey16.png", 32, 32) == (grey // 256)[..., None]).all()


def test_16_bits_in_an_older_pillows_mode_and_floats():
    grey = np.arange(0, 2**16, 64, dtype=np.int32).reshape(32, 32)
    got = to_video_tensor("image", Image.fromarray(grey), 1, (32, 32))
    assert np.abs(255 * got[0, 0].numpy() - grey // 256).max() < 1e-3
    for bad, word in ((grey - 1, "-1 to"), (grey.astype(np.float32), "mode F")):
        with pytest.raises(ValueError, match=f"image: .*{word}"):
            to_video_tensor("image", Image.fromarray(bad), 1, (32, 32))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_an_animation_of_one_frame_is_a_picture(tmp_path, way, kind):
    frame = quadrants(32, 32)
    options = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(frame).save(tmp_path / f"one.{kind}", save_all=True, **options)
    assert (way(tmp_path / f"one.{kind}", 32, 32) == frame).all()


def test_one_frame_of_a_video_is_a_picture_and_more_are_none(tmp_path):
    one = write_video(tmp_path / "one.mp4", [quadrants(32, 32)])
    assert np.abs(image.read_image(one, 32, 32).astype(int) - quadrants(32, 32)).mean() < 4
    write_video(tmp_path / "five.mp4", greys(5))
    pages = [Image.fromarray(frame) for frame in greys(5)]
    for name in ("five.gif", "five.png", "five.webp"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:], lossless=True)
    for name in ("five.mp4", "five.gif", "five.png", "five.webp"):
        with pytest.raises(ValueError, match="holds 5 frames") as error:
            image.read_image(tmp_path / name, 32, 32)
        assert str(error.value).startswith(f"{tmp_path / name}: ")


def test_what_is_cut_off_or_no_picture_is_refused_by_name(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for kind in ("jpg", "png", "webp", "gif"):
        Image.fromarray(noise).save(tmp_path / f"whole.{kind}")
        data = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("a text" * 100)
    (tmp_path / "empty.jpg").touch()
    for name in ("cut.jpg", "cut.png", "cut.webp", "cut.gif", "text.png", "empty.jpg"):
        with pytest.raises(ValueError, match="is no image that can be read") as error:
            image.read_image(tmp_path / name, 32, 32)
        assert str(error.value).startswith(f"{tmp_path / name}: ") and "avcodec" not in str(error.value)
        with pytest.raises(ValueError, match="input_reference: is no image that can be read"):
            uploaded(tmp_path / name, 32, 32)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        image.read_image(tmp_path / "none.png", 32, 32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (3, 2000)])
def test_a_strip_is_cut_before_it_is_scaled(tmp_path, way, size):
    """The middle has another colour than the rest, and is all that is seen."""
    pixels = np.zeros((*size, 3), np.uint8)
    axis = int(size[1] > size[0])
    middle = slice(size[axis] // 2 - 10, size[axis] // 2 + 10)
    pixels[(slice(None), middle) if axis else middle] = (10, 200, 90)
    Image.fromarray(pixels).save(tmp_path / "strip.png")
    assert (way(tmp_path / "strip.png", 48, 32) == (10, 200, 90)).all()


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path):
    y, x = np.mgrid[:800, :1200]
    smooth = np.stack([y * 255 / 800, x * 255 / 1200, (x + y) * 255 / 2000], -1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "photo.jpg", quality=95)
    assert np.abs(image.read_image(tmp_path / "photo.jpg", 64, 96).astype(int) - fit(smooth, 64, 96)).max() <= 3
