"""The shipped model's whole life on the pretend GPU: the frames are a CPU's, nothing waits that need not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsa_engine import Confidence, Fixed, Pipeline, Relative
from dsa_engine.engine.batch_runner import BatchRunner
from tests.support.fake_cuda.device import READ, TO_DEVICE, TO_HOST, WAIT, device

PROMPT, OTHER = "a red circle moves sideways on gray", "a blue square jumps"


KINDS = {
    "float32": {"dtype": torch.float32},
    "fp8": {"dtype": torch.bfloat16, "quantization": "fp8"},
    "deterministic": {"dtype": torch.float32, "deterministic": True},
    "token": {"dtype": torch.bfloat16, "quantization": "fp8", "head": "token"},
}


@pytest.fixture(scope="module", params=KINDS)
def options(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def pipe(options):
    """Warmed up: every graph is captured, so nothing in a capture was forbidden."""
    pipe = Pipeline.from_pretrained("shapes", device="cuda", max_sessions=2, **options)
    device.captured.clear()
    pipe.warmup()
    assert sum(device.captured.values()) > 1000
    return pipe


def life(pipe) -> list:
    """Chunks of a session whose prompt changes."""
    with pipe.session(PROMPT, step_policy=Confidence(0.5), seed=1) as session:
        chunks = [session.next_chunk() for _ in range(3)]
        session.update(OTHER)
        return [*chunks, session.next_chunk(), session.next_chunk()]


def same(chunks, others) -> None:
    assert [c.steps for c in chunks] == [c.steps for c in others]
    for chunk, other in zip(chunks, others):
        assert np.array_equal(chunk.frames, other.frames)


def test_graphs_make_the_frames_of_eager_forwards(pipe, options):
    same(life(pipe), life(Pipeline.from_pretrained("shapes", device="cuda", **options)))


def test_the_frames_are_a_cpus(pipe, options):
    """As far as rounding goes, which a rollout enlarges. FP8 is in bfloat16 here and in float32 there."""
    if "quantization" in options:
        pytest.skip("not the same dtype")
    chunks, others = life(pipe), life(Pipeline.from_pretrained("shapes", device="cpu", **options))
    assert [c.steps for c in chunks] == [c.steps for c in others]
    errors = [np.abs(chunk.frames.astype(int) - other.frames) for chunk, other in zip(chunks, others)]
    assert errors[0].max() <= 1 and max(error.mean() for error in errors) < 0.5


@pytest.mark.parametrize(
    "policy", [Fixed(2), Confidence(0.5), Relative()], ids=["known count", "decided on the device", "relative"]
)
def test_a_steady_chunk_waits_once_for_the_decision_and_once_for_its_frames(pipe, policy, request):
    with pipe.session(PROMPT, step_policy=policy, seed=1) as session:
        session.next_chunk(), session.next_chunk()
        phase = device.phase = request.node.name
        session.next_chunk()
        device.phase = "after"
    waits = [e for e in device.of(phase, READ, WAIT, TO_DEVICE, TO_HOST) if "pinned, asynchronous" not in e.detail]
    # Triton draws the noise on a GPU; plain torch, which stands in for it here, reads the seed to draw it on the CPU.
    waits = {(e.kind, e.place.split(" ")[0]): e.detail for e in waits if "ops/noise.py" not in e.place}
    counts = device.of(phase, WAIT)
    assert all(kind == WAIT for kind, _ in waits), waits
    assert sum(counts.values()) == 1 + (not isinstance(policy, Fixed)), counts


def test_snapshot_restore_reset(pipe):
    with pipe.session(PROMPT, seed=1) as session:
        first = session.next_chunk()
        saved = session.snapshot()
        second = session.next_chunk()
        session.restore(saved)
        same([session.next_chunk()], [second])
        session.reset()
        same([session.next_chunk()], [first])


def test_a_stream_decodes_in_threads(pipe):
    with pipe.session(PROMPT, step_policy=Fixed(2), seed=1) as session:
        expected = [session.next_chunk() for _ in range(3)]
    same(list(pipe.stream(PROMPT, num_frames=9, step_policy=Fixed(2), seed=1)), expected)


def test_a_runner_makes_what_each_session_makes(pipe):
    def alone(prompt, **options):
        with pipe.session(prompt, **options) as session:
            return [session.next_chunk() for _ in range(2)]

    kinds = [(PROMPT, {"seed": 1}), (OTHER, {"seed": 2, "step_policy": "fixed:3"})]
    expected = [alone(prompt, **options) for prompt, options in kinds]
    sessions, runner = [pipe.session(prompt, **options) for prompt, options in kinds], BatchRunner(4)
    made = {id(session): [] for session in sessions}
    for _ in range(2):
        for session in sessions:
            runner.add(session)
        while len(runner):
            for session in runner.forward():
                made[id(session)].append(session.finish())
    for session, chunks in zip(sessions, expected):
        if pipe.engine.deterministic:
            same(made[id(session)], chunks)
        assert [c.steps for c in made[id(session)]] == [c.steps for c in chunks]
        session.close()


def test_calls_with_text_pictures_and_videos(pipe, options):
    if options != KINDS["float32"]:
        pytest.skip("once is enough")
    frames = pipe([PROMPT, OTHER], seed=1, num_frames=24).frames
    assert frames.shape == (2, 24, 64, 64, 3) and np.isfinite(frames).all()
    picture = np.zeros((64, 64, 3), np.uint8)
    assert pipe(PROMPT, image=picture, num_frames=25).frames.shape[1] == 25
    assert pipe(PROMPT, video=np.zeros((24, 64, 64, 3), np.uint8), strength=0.5).frames.shape[1] == 24


def test_the_second_device():
    """Everything on cuda:1, whichever device is current, in every thread."""
    pipe = Pipeline.from_pretrained("shapes", device="cuda:1")
    chunks = list(pipe.stream(PROMPT, num_frames=6, step_policy=Fixed(1), seed=1))
    assert chunks[0].latents.device.index == 1 and len(chunks) == 2
