"""The report of a run and contact sheets: what is drawn comes from the data; a failure leaves no trace."""

from __future__ import annotations

import os
from types import SimpleNamespace

import av
import numpy as np
import pytest

from dsa_engine.media.report import report_figure, write_report, write_sheet
from dsa_engine.shapes.world import render_clip


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    prompts = ["a red circle moves sideways"] * 3 + ["a blue square jumps on navy"] * 2
    return render_clip(np.random.default_rng(0), prompts).frames


def left_in(folder) -> list[str]:
    return sorted(os.listdir(folder))


def chunks_of(clip: np.ndarray, steps, confidence=None, prompts=None) -> list[SimpleNamespace]:
    n = len(steps)
    confidence = [None] * n if confidence is None else confidence
    prompts = ["a red circle jumps"] * n if prompts is None else prompts
    frames = [clip[3 * (i % 5) : 3 * (i % 5) + 3] for i in range(n)]
    names = ("frames", "steps", "confidence", "prompt")
    return [SimpleNamespace(**dict(zip(names, row))) for row in zip(frames, steps, confidence, prompts)]


def parts(figure) -> SimpleNamespace:
    """The axes of a report from the top: prompts, frames, bars; the confidence's if there is one."""
    band, sheet, bars, *confidence = figure.axes
    return SimpleNamespace(band=band, sheet=sheet, bars=bars, confidence=confidence[0] if confidence else None)


def test_bars_and_dots_come_from_the_data(clip):
    values = [[0.9, 0.4, 0.8], [0.7, 0.7, 0.6], [0.95, 1.0, 0.99]]
    report = parts(report_figure(chunks_of(clip, [4, 2, 1], values), threshold=0.6, max_steps=4))
    bars = report.bars.containers[0]
    assert [bar.get_height() for bar in bars] == [4, 2, 1]
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([0, 1, 2])
    assert [text.get_text() for text in report.bars.texts] == ["4", "2", "1"]
    line, threshold = report.confidence.lines
    assert list(line.get_ydata()) == [0.4, 0.6, 0.95]
    assert list(line.get_xdata()) == [0, 1, 2]
    assert set(threshold.get_ydata()) == {0.6}
    assert report.confidence.get_ylim()[1] / 1.0 == report.bars.get_ylim()[1] / 4, "the two axes share their grid"


def test_without_confidence_there_is_no_second_axis(clip):
    report = parts(report_figure(chunks_of(clip, [4, 4])))
    assert report.confidence is None
    assert [text.get_text() for text in report.bars.get_legend().get_texts()] == ["steps"]


def test_frames_stand_over_their_bar(clip):
    figure = report_figure(chunks_of(clip, [1, 2, 3, 4, 1]))
    report = parts(figure)
    assert len(report.sheet.images) == 15
    for i, image in enumerate(report.sheet.images):  # three of a chunk, then the next chunk's
        left, right, _, _ = image.get_extent()
        assert (left + right) / 2 == pytest.approx(i // 3)
        assert np.array_equal(image.get_array(), clip[i])
    figure.canvas.draw()
    to_pixels = report.sheet.transData.transform((2, 0))[0], report.bars.transData.transform((2, 0))[0]
    assert to_pixels[0] == pytest.approx(to_pixels[1])
    left, right, low, high = report.sheet.images[0].get_extent()
    (x0, y0), (x1, y1) = report.sheet.transData.transform([(left, low), (right, high)])
    assert x1 - x0 == pytest.approx(y1 - y0, rel=1e-6), "a square frame is drawn square"


def test_a_switch_is_a_line_between_two_chunks_with_its_prompt(clip):
    prompts = ["a red circle jumps"] * 2 + ["a blue square rests"] * 3
    report = parts(report_figure(chunks_of(clip, [1] * 5, prompts=prompts)))
    for ax in (report.sheet, report.bars):
        assert [set(line.get_xdata()) for line in ax.lines] == [{1.5}]
    texts = [text.get_text().replace("\n", " ") for text in report.band.texts]
    assert texts == ["a red circle jumps", "a blue square rests"]
    assert [text.xy[0] for text in report.band.texts] == [-0.5, 1.5]


def test_texts_stay_inside_their_band(clip):
    rng = np.random.default_rng(1)
    prompts = [
        f"a {color} hyperrealistic circle on {'navy' * (i % 7 == 0) or 'gray'}"
        for i, color in enumerate(rng.choice(["red", "green", "magenta"], size=20))
    ]
    figure = report_figure(chunks_of(clip, [2] * 20, prompts=prompts))
    figure.canvas.draw()
    band = parts(figure).band
    firsts = [i for i in range(20) if i == 0 or prompts[i] != prompts[i - 1]]
    assert len(band.texts) == len(firsts)
    for text, end in zip(band.texts, [*firsts[1:], 20]):
        assert set(text.get_text().split()) <= {*" ".join(prompts).split(), "…"}, "no word is torn"
        assert text.get_window_extent().x1 <= band.transData.transform((end - 0.5, 0))[0] + 1


@pytest.mark.parametrize("n", [1, 3, 18])
def test_the_title_fits_the_image(clip, n):
    title = "48 frames in 16 chunks, 1.62 steps a chunk (per-chunk:4,2,1,1,1,1,1,1,4,2,1,1,1,3,1,1), 99.6 a second"
    figure = report_figure(chunks_of(clip, [2] * n), title=title)
    figure.canvas.draw()
    assert figure.texts[0].get_text() == title
    assert figure.texts[0].get_window_extent().x1 < figure.bbox.x1


def test_a_long_clip_thins_its_frames_not_its_bars(clip):
    report = parts(report_figure(chunks_of(clip, [1 + i % 4 for i in range(60)])))
    assert [bar.get_height() for bar in report.bars.containers[0]] == [1 + i % 4 for i in range(60)]
    assert len(report.sheet.images) == 20
    assert np.array_equal(report.sheet.images[1].get_array(), clip[3 * 3 + 1])  # chunk 3, its middle frame
    assert sum(report.sheet.images[1].get_extent()[:2]) / 2 == pytest.approx(4), "over chunks 3, 4 and 5"


@pytest.mark.parametrize("n", [1, 18])
def test_the_file_is_a_image_of_sensible_size(tmp_path, clip, n):
    write_report(tmp_path / "new" / "r.png", chunks_of(clip, [2] * n, [[0.5] * 3] * n), threshold=0.5, title="a clip")
    with av.open(str(tmp_path / "new" / "r.png")) as container:  # FFmpeg reads PNG, and knows nothing of matplotlib
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert 300 < image.shape[0] < 1200 and 600 < image.shape[1] < 2000
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
    assert left_in(tmp_path / "new") == ["r.png"]


def test_a_report_that_fails_keeps_the_old_one(tmp_path, clip, monkeypatch):
    path = tmp_path / "r.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="at least one"):
        write_report(path, [])
    with pytest.raises(ValueError, match="must end in .png"):
        write_report(tmp_path / "r.jpg", chunks_of(clip, [1]))

    def broken(self, file, **_):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, chunks_of(clip, [1]))
    assert path.read_bytes() == b"old"
    assert left_in(tmp_path) == ["r.png"]


def test_a_contact_sheet_shows_every_clip_under_its_label(clip, tmp_path):
    """The PNG, read back: a row of clips one after another, each row with the colours of its own frames."""
    from matplotlib.image import imread

    clips = np.stack([clip[:6], clip[9:15]])  # red on black, blue on navy
    write_sheet(tmp_path / "new" / "sheet.png", clips, ["red", "blue"], title="two")
    image = imread(tmp_path / "new" / "sheet.png")[..., :3]
    upper, lower = np.array_split(image, 2)

    def share(part, color):
        return (np.abs(part - np.array(color) / 255).max(axis=-1) < 0.1).mean()

    assert share(upper, (230, 40, 40)) > 0.02 and share(lower, (40, 70, 255)) > 0.02
    assert share(lower, (230, 40, 40)) == share(upper, (40, 70, 255)) == 0
    assert share(lower, (20, 28, 84)) > 0.2
    assert left_in(tmp_path / "new") == ["sheet.png"]


def test_a_sheet_that_cannot_be_drawn_leaves_nothing(clip, tmp_path):
    with pytest.raises(ValueError, match="1 labels for 2 clips"):
        write_sheet(tmp_path / "sheet.png", np.stack([clip, clip]), ["one"])
    with pytest.raises(ValueError, match="must be a numpy array uint8"):
        write_sheet(tmp_path / "sheet.png", np.zeros((1, 2, 4, 4, 3)), ["one"])
    assert left_in(tmp_path) == []
