"""The 1.3B at 480 x 832 on the pretend GPU, its large tensors without data: kernels compiled as they are launched,
waits and memory of its chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.e2e.protocol import random_pipeline
from dsa_engine import Fixed
from dsa_engine.models import memory_estimate
from tests.support.fake_cuda import launch
from tests.support.fake_cuda.device import READ, TO_DEVICE, TO_HOST, WAIT, device

HEIGHT, WIDTH, FRAMES = 60, 104, 81


@pytest.fixture(scope="module", params=["cuda:0", "cuda:1"])
def pipe(request):
    """Warmed up, one session. On the second device only with the tiny VAE and few chunks: nothing else differs."""
    pipe = random_pipeline("wan2.1-t2v-1.3b", request.param, "wan" if request.param == "cuda:0" else "taehv")
    device.reset_peak()
    device.phase = "warmup"
    pipe.warmup()
    return pipe


@pytest.fixture(scope="module")
def chunks(pipe):
    """Four of a session; the phases are the device and their numbers."""
    where = pipe.engine.dit.device
    embeds = torch.zeros(1, 64, 4096, dtype=torch.bfloat16, device=where)
    with pipe.session(prompt_embeds=embeds, num_frames=FRAMES, step_policy=Fixed(2)) as session:
        chunks = []
        for number in range(4):
            device.phase = f"{where} chunk {number}"
            chunks.append(session.next_chunk())
        device.phase = "after"
    return chunks


def test_chunks_have_their_shapes(chunks):
    assert [c.frames.shape for c in chunks] == [(9, 480, 832, 3)] + 3 * [(12, 480, 832, 3)]
    assert [c.steps for c in chunks] == [2, 2, 2, 2]


def test_no_kernel_is_first_compiled_in_a_capture(chunks):
    assert len(launch.compiled) >= 20
    assert not +launch.late
    assert launch.launches["attention_kernel"] > 100


def test_a_steady_chunk_waits_for_its_frames_alone(pipe, chunks):
    """No host read and no copy that waits; the one wait is for the copy of the frames."""
    events = device.of(f"{pipe.engine.dit.device} chunk 3", READ, WAIT, TO_DEVICE, TO_HOST)
    rest = {event: count for event, count in events.items() if "pinned, asynchronous" not in event.detail}
    assert [(event.kind, count) for event, count in rest.items()] == [(WAIT, 1)], rest


def test_memory_is_what_info_predicts(pipe, chunks):
    """Within 5 % of the peak, CUDA's own context aside."""
    engine = pipe.engine
    if engine.dit.device.index:
        pytest.skip("the first pipeline is still there")
    parts = {"generator": engine.dit, "confidence": engine.head, "vae": engine.decoder, "text": None}
    load = memory_estimate.Workload(HEIGHT, WIDTH, 21, sessions=1)
    sizes = memory_estimate.footprints(parts)
    predicted = (
        memory_estimate.predict(engine.dit.config, replace(engine.config), load, **sizes).peak
        - memory_estimate.CUDA_CONTEXT_BYTES
    )
    print(f"{engine.dit.device}: predicted {predicted / 1e9:.2f} GB, counted {device.memory.peak / 1e9:.2f} GB")
    assert abs(device.memory.peak / predicted - 1) < 0.05
