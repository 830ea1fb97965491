"""The Wan VAE against plain torch op by op, what it takes in bfloat16, and how its tensors lie in memory."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.micro import eager_vae
from dsa_engine.models import wan_vae as vae_module
from dsa_engine.models.streaming_vae import FeatureCache
from dsa_engine.models.wan_vae import LATENT_MEAN, LATENT_STD, CausalConv3d, WanVAE

PARTS = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    """Four levels, one of them without time, and every parameter random."""
    torch.manual_seed(0)
    model = WanVAE(dim=8).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.12)
        if name.endswith("gamma"):
            parameter += 1
    return model


def latents(frames, rows=1, height=2, width=3):
    return torch.randn(rows, frames, 16, height, width, generator=torch.Generator().manual_seed(frames))


@settings(max_examples=10)
@given(PARTS, st.integers(1, 2), st.booleans())
def test_any_partition_gives_the_frames_of_plain_torch(vae, parts, rows, laid_out):
    """Each in chunks of its own; the weights in either order in memory."""
    if laid_out:
        vae.to_channels_last()
    clip = latents(sum(parts), rows)
    expected, past = [], None
    for chunk in clip.split(1, dim=1):
        frames, past = eager_vae.decode(vae, chunk, past)
        expected.append(frames)
    found, state = [], None
    for chunk in clip.split(parts, dim=1):
        frames, state = vae.decode(chunk, state)
        found.append(frames)
    expected = torch.cat(expected, dim=1)
    assert 0.02 < expected.std() and ((expected == 0) | (expected == 1)).float().mean() < 0.5
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=2e-5)
    for mine, theirs in zip(state, past, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_in_bfloat16_it_is_as_close_to_float32_as_plain_torch(vae):
    half = WanVAE(dim=8).requires_grad_(False)
    half.load_state_dict(vae.state_dict())
    half = half.to(torch.bfloat16).to_channels_last()
    state = past = plain = None
    for seed in range(3):
        chunk = latents(3 + seed)[:, -3:]
        expected, past = eager_vae.decode(vae, chunk, past)
        rounded, plain = eager_vae.decode(half, chunk, plain)
        frames, state = half.decode(chunk, state)
        error, allowed = ((x.float() - expected).norm().item() for x in (frames, rounded))
        assert frames.dtype == torch.bfloat16 and error <= 1.2 * allowed, (seed, error, allowed)


def test_laying_out_keeps_the_weights(vae):
    model = WanVAE(dim=8).requires_grad_(False)
    model.load_state_dict(vae.state_dict())
    assert model.to_channels_last() is model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, vae.state_dict()[name])
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            layout = torch.channels_last if isinstance(layer, nn.Conv2d) else torch.channels_last_3d
            assert layer.weight.is_contiguous(memory_format=layout)


class Copies(TorchDispatchMode):
    """Elements that are moved without being computed with, by op. Convolutions give the layout that cuDNN's give:
    channels last if input or weight is. On a CPU that depends on its instructions and the dtype: without oneDNN's
    kernel for both, torch's own convolution over time puts the channels first, whatever it was given."""

    def __init__(self):
        super().__init__()
        self.elements = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("clone", "copy_", "cat", "_to_copy", "constant_pad_nd", "stack"):
            self.elements[func.overloadpacket.__name__] += out.numel()
        if func.overloadpacket.__name__ == "convolution":
            layout = torch.channels_last_3d if out.ndim == 5 else torch.channels_last
            if any(t.is_contiguous(memory_format=layout) for t in args[:2]):
                out = out.contiguous(memory_format=layout)
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_is_copied_but_the_past_the_enlarged_and_what_no_norm_precedes(vae, monkeypatch, dtype):
    """Each input of a convolution over time is preceded by two frames that are copied there, and leaves two."""
    model = WanVAE(dim=8).requires_grad_(False)
    model.load_state_dict(vae.state_dict())
    model = model.to(dtype).to_channels_last()
    chunk = latents(3).to(dtype)
    layouts = []

    def look(layer, args, out):
        x = args[0]
        wanted = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
        layouts.append(x.is_contiguous(memory_format=wanted) and out.is_contiguous(memory_format=wanted))

    convolutions = [
        m for m in model.decoder.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)) and max(m.kernel_size) > 1
    ]
    hooks = [layer.register_forward_hook(look) for layer in convolutions if layer is not model.decoder.conv1]
    convolve = CausalConv3d.convolve

    def looked(layer, x):
        layouts.append(x.is_contiguous(memory_format=torch.channels_last_3d))
        return convolve(layer, x)

    monkeypatch.setattr(CausalConv3d, "convolve", looked)  # with the past in front
    _, state = model.decode(chunk)
    layouts.clear()
    with Copies() as copies:
        model.decode(chunk, state)
    for hook in hooks:
        hook.remove()
    assert len(layouts) == 34 + 32 and all(layouts)
    tails = sum(tail.numel() for tail in state)
    pixels = 2 * 3
    enlarged = [(6, 4, 32), (12, 16, 32), (12, 64, 16)]  # frames, times the pixels of the latents, channels
    outputs = sum(frames * scale * pixels * channels for frames, scale, channels in enlarged)
    assert copies.elements["clone"] - tails - outputs in range(0, 3 * 16 * pixels + 1)  # and at most the latents
    inputs = 3 * pixels * 16 + 3 * pixels * 32 + 6 * 4 * pixels * 32  # of the first, and of the two that double frames
    # What the reference of the 29 norms writes behind the past; a kernel has no copy of it.
    assert sum(frames > 0 for frames in frames_of(model)) == 29
    normed = sum(t.numel() // 2 * frames for t, frames in zip(state, frames_of(model)))
    assert copies.elements["copy_"] == tails + inputs + normed
    assert not copies.elements["cat"] and not copies.elements["stack"] and not copies.elements["constant_pad_nd"]


@pytest.mark.parametrize("bias_later", [False, True])
def test_padded_outputs_change_no_value_and_no_weight(bias_later, monkeypatch):
    """Of small integers, whose sums are exact in whatever order."""
    layer = CausalConv3d(16, 3, bias_later=bias_later).requires_grad_(False)
    for tensor in layer.parameters():
        tensor.copy_(torch.randint(-8, 9, tensor.shape))
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randint(-8, 9, (2, 16, 4, 5, 6)).float().contiguous(memory_format=torch.channels_last_3d)
    expected = layer.convolve(x)
    monkeypatch.setattr(vae_module, "_unit", lambda x: 8)
    found = layer.convolve(x)
    assert expected.shape == found.shape == (2, 3, 2, 5, 6) and expected.abs().max() > 100
    assert torch.equal(found, expected)
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


class Convolutions(TorchDispatchMode):
    """The weights of those over time, in their order."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "convolution" and args[0].ndim == 5:
            self.weights.append(args[1])
        return func(*args, **(kwargs or {}))


def test_at_full_size_only_the_last_convolution_is_padded(monkeypatch):
    """For tensor cores, which take 8 outputs of a 16-bit dtype; the weights keep their names and shapes."""
    for device, dtype, unit in [
        (True, torch.bfloat16, 8),
        (True, torch.float16, 8),
        (True, torch.float32, 1),
        (False, torch.bfloat16, 1),
    ]:
        assert vae_module._unit(SimpleNamespace(is_cuda=device, dtype=dtype)) == unit
    monkeypatch.setattr(vae_module, "_unit", lambda x: 8)
    with torch.device("meta"), torch.no_grad():
        vae = WanVAE().to("meta", torch.bfloat16).to_channels_last()
        shapes = {name: tensor.shape for name, tensor in vae.state_dict().items()}
        _, state = vae.decode(torch.empty(1, 3, 16, 4, 6))
        with Convolutions() as seen:
            frames, _ = vae.decode(torch.empty(1, 3, 16, 4, 6), state)
    convolutions = [m for m in vae.decoder.modules() if isinstance(m, CausalConv3d)]
    padded = [w for w, m in zip(seen.weights, convolutions, strict=True) if w.shape != m.weight.shape]
    assert frames.shape == (1, 12, 3, 32, 48) and len(padded) == 1 and padded[0] is seen.weights[-1]
    assert padded[0].shape == (8, 96, 3, 3, 3)
    assert padded[0].is_contiguous(memory_format=torch.channels_last_3d)
    assert shapes == {name: tensor.shape for name, tensor in vae.state_dict().items()}
    assert shapes["decoder.head.2.weight"] == (3, 96, 3, 3, 3) and len(shapes) == 194


class DefaultDevice(TorchFunctionMode):
    """Where a `with torch.device(...)` would act: the memory of tensors made without saying on what device."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _device_constructors() and (kwargs or {}).get("device") is None:
            self.kept.append(out)
        return out


def test_all_of_it_is_made_on_the_default_device():
    with DefaultDevice() as made:
        vae = WanVAE(dim=2)
    places = {tensor.untyped_storage().data_ptr() for tensor in made.kept}
    tensors = {**dict(vae.named_parameters()), **dict(vae.named_buffers())}
    assert {"mean", "std", "conv2.weight"} <= tensors.keys()
    assert [n for n, t in tensors.items() if t.untyped_storage().data_ptr() not in places] == []


def test_made_on_the_meta_device_it_keeps_what_no_file_holds():
    with torch.device("meta"):
        vae = WanVAE(dim=2)
    assert vae.conv2.weight.is_meta and not vae.mean.is_meta
    assert vae.mean.flatten().tolist() == pytest.approx(LATENT_MEAN)
    assert vae.std.flatten().tolist() == pytest.approx(LATENT_STD)


def frames_of(vae) -> list[int]:
    """Of each convolution's input over time, 0 where no norm precedes it, in the order of the state."""
    found, frames = [], 3
    for name, _ in vae.decoder.named_modules():
        if name.endswith(("residual.2", "residual.6", "head.2")):
            found.append(frames)
        elif name == "conv1":
            found.append(0)
        elif name.endswith("time_conv"):
            found.append(0)
            frames *= 2
    return found


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_the_next_state_goes_where_it_is_told(vae, frames):
    """Of a chunk in one pass and in several; the state before stays."""
    _, state = vae.decode(latents(2))
    before = [tail.clone() for tail in state]
    expected, after = vae.decode(latents(frames), state)
    into = [torch.full_like(tail, float("nan")) for tail in state]
    found, told = vae.decode(latents(frames), state, into)
    assert torch.equal(found, expected) and all(a is b for a, b in zip(told, into, strict=True))
    assert all(map(torch.equal, into, after)) and all(map(torch.equal, state, before))


@pytest.mark.parametrize("axis, shape", [(2, (2, 3, 4, 2, 2)), (1, (2, 4, 3, 2, 2))])
@pytest.mark.parametrize("frames", [1, 2])
def test_a_stream_puts_the_past_before_what_is_written(axis, shape, frames):
    x, past = torch.randn(shape), torch.randn([frames if i == axis else n for i, n in enumerate(shape)])
    for state, before in ((None, torch.zeros_like(past)), ((past,), past)):
        stream = FeatureCache(state, axis)
        whole = stream.prepend_history(x, frames, lambda part: part.copy_(2 * x))
        assert torch.equal(whole, torch.cat((before, 2 * x), dim=axis))
        assert torch.equal(stream.new_state[0], whole.narrow(axis, shape[axis], frames))
        assert torch.equal(FeatureCache(state, axis).prepend_history(x, frames), torch.cat((before, x), dim=axis))


def test_gradients_reach_the_latents_and_every_weight():
    """Of a later chunk, whose past has gradients too."""
    torch.manual_seed(0)
    vae = WanVAE(dim=2)
    first, chunk = (latents(2).requires_grad_() for _ in range(2))
    _, state = vae.decode(first)
    frames, _ = vae.decode(chunk, state)
    frames.sum().backward()
    assert first.grad.abs().sum() > 0 and chunk.grad.abs().sum() > 0
    assert all(p.grad is not None for p in [*vae.decoder.parameters(), *vae.conv2.parameters()])
