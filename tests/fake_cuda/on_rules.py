"""The pretend device itself: what a GPU refuses it refuses, with the line that asked; what costs a wait is an event."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from tests.support.fake_cuda.device import PINNED, READ, TO_DEVICE, TO_HOST, WAIT, device

HERE = "tests/fake_cuda/on_rules.py"


@pytest.fixture
def events(request):
    """Those of this test: kind -> how many."""
    device.phase = request.node.name

    def kinds() -> dict[str, int]:
        counts: dict[str, int] = {}
        for event, count in device.of(device.phase).items():
            assert event.place.startswith(HERE)
            counts[event.kind] = counts.get(event.kind, 0) + count
        return counts

    return kinds


def capture(function):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.parametrize("to", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)])
def test_tensors_say_where_they_are(to):
    for x in (
        torch.zeros(3, device=to),
        torch.zeros(3).to(to),
        torch.tensor([1, 2], device=to),
        torch.ones(2).to(to)[:1],
    ):
        assert x.is_cuda and x.device == torch.device("cuda", 0)
    assert torch.nn.Linear(2, 3).to(to).weight.device == torch.device("cuda", 0)


def test_it_computes_what_a_cpu_computes():
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    assert torch.equal((a.to("cuda") @ b.to("cuda")).relu().to("cpu"), (a @ b).relu())


@pytest.mark.parametrize(
    "mix",
    [
        lambda gpu, cpu: gpu + cpu,
        lambda gpu, cpu: torch.cat([gpu, cpu]),
        lambda gpu, cpu: cpu[gpu.long()],
        lambda gpu, cpu: gpu.index_put_((torch.zeros(3, dtype=torch.long, device="cuda"),), cpu),
        lambda gpu, cpu: gpu + gpu.to("cuda:1"),
        lambda gpu, cpu: torch.nn.functional.linear(gpu[None], cpu[None]),
    ],
)
def test_a_mix_of_devices_is_an_error_with_its_line(mix):
    with pytest.raises(RuntimeError, match=rf"{HERE}:\d+"):
        mix(torch.zeros(3, device="cuda"), torch.zeros(3))


def test_a_generator_of_the_device_draws_there():
    draw = [torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) for _ in range(2)]
    assert draw[0].is_cuda and torch.equal(draw[0].cpu(), draw[1].cpu())


def test_a_deep_copy_is_there_and_counted():
    before, layer = device.memory.now, torch.nn.Linear(10, 10).to("cuda")
    other = copy.deepcopy(layer)
    assert other.weight.is_cuda and device.memory.now == before + 2 * 440
    other.weight.data.zero_()
    assert layer.weight.abs().sum().cpu() > 0
    del layer, other
    assert device.memory.now == before


def test_a_number_on_the_cpu_may_take_part():
    assert (torch.zeros(3, device="cuda") + torch.tensor(2.0)).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_a_host_read_is_an_event_and_no_part_of_a_capture(read, events):
    x = torch.ones(3, device="cuda")
    read(x)
    assert events()[READ] >= 1
    with pytest.raises(RuntimeError, match=rf"when stream is capturing.*{HERE}"):
        capture(lambda: read(x))


def test_copies_say_whether_they_wait(events):
    x = torch.ones(4, device="cuda")
    x.cpu(), torch.ones(4).to("cuda", non_blocking=True)  # neither is asynchronous: the host's memory is pageable
    host = torch.empty(4, pin_memory=True)
    host.copy_(x, non_blocking=True)
    x.copy_(torch.ones(4).pin_memory(), non_blocking=True)
    x[torch.tensor([1])] = 2.0
    assert events() == {TO_HOST: 2, TO_DEVICE: 3, PINNED: 2}
    details = sorted(event.detail for event in device.of(device.phase, TO_HOST))
    assert details == ["pageable, blocking, 16 bytes", "pinned, asynchronous, 16 bytes"]
    assert {event.detail for event in device.of(device.phase, TO_DEVICE)} == {
        "pageable, blocking, 16 bytes",
        "pinned, asynchronous, 16 bytes",
        "pageable, blocking, 8 bytes",
    }


def test_waits_are_events(events):
    torch.cuda.synchronize()
    torch.cuda.current_stream().synchronize()
    torch.cuda.Event().synchronize()
    assert events() == {WAIT: 3}


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x + torch.ones(3).to("cuda"),
        lambda x: x.cpu(),
        lambda x: x[torch.tensor([0])],
        lambda x: torch.ones(3).pin_memory(),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_what_a_capture_forbids(forbidden):
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        capture(lambda: forbidden(x))
    assert torch.cuda.is_current_stream_capturing() is False


def test_a_replay_is_the_function_of_what_lies_there_then():
    x, out = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")

    def function():
        out.copy_((x * 2).cumsum(0).add_(1.0))
        return x + out

    graph, result = capture(function)
    assert out.tolist() == [0, 0, 0]  # nothing runs while it is captured
    graph.replay()
    assert out.tolist() == [3, 5, 7] and result.tolist() == [4, 6, 8]
    x.fill_(2.0)
    graph.replay()
    assert out.tolist() == [5, 9, 13] and result.tolist() == [7, 11, 15]


def test_memory_is_that_of_live_storages():
    before = device.memory.now
    x = torch.zeros(1000, device="cuda")
    view = x.view(10, 100)[2:]
    assert device.memory.now == before + 4000
    del x
    assert device.memory.now == before + 4000
    device.reset_peak()
    total = (view + 1).sum() + 1
    assert device.memory.peak >= before + 4000 + 3200
    del view, total
    assert device.memory.now == before


def test_a_pool_keeps_what_its_captures_work_with():
    x, pool = torch.zeros(1000, device="cuda"), torch.cuda.graph_pool_handle()
    for size in (1000, 500):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool):
            (x[:size] + 1).sum()
    assert 4000 <= device.memory.pools[pool] <= 4100


def test_devices_have_an_index_in_each_thread():
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        x = torch.zeros(3, device="cuda")
        seen = []
        thread = threading.Thread(target=lambda: seen.append(torch.zeros(1, device="cuda").device.index))
        thread.start()
        thread.join()
    assert (x.device.index, seen, torch.cuda.current_device()) == (1, [0], 0)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.set_device(2)
