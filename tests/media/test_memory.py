"""Reading takes no more memory than a frame and the result: the peak of a process over what it holds at rest."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support.media.files import write_video

LIMIT = 200e6  # bytes
PROGRAM = """
import sys
import numpy as np, torch, av
from PIL import Image
from dsa_engine.media import image, preprocess, video

def memory(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name + ":"))

path, given = sys.argv[2], None
preprocess.to_video_tensor("image", np.zeros((8, 8, 3), np.uint8), 1, (4, 4))  # libraries are loaded
if sys.argv[1] == "array":
    given = np.full((96, 720, 1280, 3), 7, np.uint8)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
rest = memory("VmRSS")
made = {
    "video": lambda: video.read_video(path, 64, 64, 12),
    "file": lambda: image.read_image(path, 480, 832),
    "upload": lambda: image.decode(open(path, "rb").read(), 480, 832),
    "array": lambda: preprocess.to_video_tensor("video", given, 1, (64, 64)),
}[sys.argv[1]]()
print(memory("VmHWM") - rest, *made.shape)
"""


def peak(way: str, path="") -> tuple[int, tuple[int, ...]]:
    """Bytes over rest, and the shape of what was read."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, way, str(path)], capture_output=True, text=True, check=True)
    bytes_, *shape = map(int, done.stdout.split())
    return bytes_, tuple(shape)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name, count, size", [("4K", 12, (2160, 3840)), ("720p", 96, (720, 1280))])
def test_a_video(tmp_path, name, count, size):
    y, x = np.mgrid[: size[0], : size[1]]
    frame = np.stack([y % 256, x % 256, (x + y) % 256], -1).astype(np.uint8)
    path = write_video(tmp_path / "clip.mp4", [frame] * count, 12, options={"preset": "ultrafast", "crf": "30"})
    bytes_, shape = peak("video", path)
    assert shape == (count, 64, 64, 3) and bytes_ < LIMIT


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["file", "upload"])
@pytest.mark.parametrize("size, kind", [((100_000, 1), "png"), ((1, 100_000), "png"), ((4096, 4096), "jpg")])
def test_a_picture(tmp_path, way, size, kind):
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / f"large.{kind}")
    bytes_, shape = peak(way, tmp_path / f"large.{kind}")
    assert shape == (480, 832, 3) and bytes_ < LIMIT


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_frames_that_are_in_memory_already():
    bytes_, shape = peak("array")
    assert shape == (1, 96, 3, 64, 64) and bytes_ < LIMIT
