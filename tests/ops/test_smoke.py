"""A faster attention as the default: what its smoke test sees, what becomes of a child, and who runs when."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from dsa_engine.cli import doctor
from dsa_engine.ops import cuda_backend as ops_cuda
from dsa_engine.ops import dispatch, reference, smoke
from dsa_engine.ops.smoke import Verdict
from dsa_engine.ops.support import E4M3, Call

CALL = Call("attention", (9, 0), torch.bfloat16, 128, torch.bfloat16)
PASSED, FAILED = Verdict(True, "its smoke test passed"), Verdict(False, "its smoke test: wrong")

# ---- what the child computes -----------------------------------------------------------------------------------------


def test_plain_torch_passes():
    assert smoke.check(reference.attention, "cpu") is None


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("a little off", lambda *args: reference.attention(*args) * 1.01),
        ("one head off", lambda *args: torch.cat((reference.attention(*args)[:, :, :1],) * 2, dim=2)),
        ("the first run alone", lambda q, k, v, slot, keys, s: reference.attention(q, k, v, slot, keys[:, :1], s)),
        (
            "every frame",
            lambda q, k, v, slot, keys, s: reference.attention(
                q, k, v, slot, torch.tensor([[[0, 5]]]).expand(4, 1, 2), s
            ),
        ),
        ("its row's slot", lambda q, k, v, slot, keys, s: reference.attention(q, k, v, torch.arange(4), keys, s)),
        (
            "no scales",
            lambda q, k, v, slot, keys, s: reference.attention(
                q, k, v, slot, keys, s and s._replace(v=torch.ones_like(s.v))
            ),
        ),
    ],
)
def test_a_wrong_kernel_fails(name, wrong):
    assert "error" in smoke.check(wrong, "cpu")


def test_a_kernel_that_gives_other_bits_the_second_time_fails():
    calls = []

    def unsteady(*args):
        calls.append(args)
        out = reference.attention(*args)
        out.view(torch.int16)[0, 0, 0, 0] ^= len(calls) % 2
        return out

    assert smoke.check(unsteady, "cpu") == "head dim 64, bfloat16 cache: not the same bits twice"


# ---- the child -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, seconds, expected",
    [
        ("print('torch says hello'); print('{\"wrong\": null}')", 60, PASSED),
        ('print(\'{"wrong": "e4m3 cache: error 1"}\')', 60, Verdict(False, "its smoke test: e4m3 cache: error 1")),
        ("import time; time.sleep(600)", 0.3, Verdict(False, "its smoke test gave no answer in 0.3 s")),
        (
            "raise SystemExit('an illegal memory access')",
            60,
            Verdict(False, "its smoke test ended with code 1: an illegal memory access"),
        ),
        ("import os; os.abort()", 60, Verdict(False, "its smoke test ended with code -6: nothing on stderr")),
        ("print('what?')", 60, Verdict(False, "its smoke test said 'what?\\n'")),
    ],
)
def test_whatever_a_child_does_there_is_a_verdict(script, seconds, expected):
    assert smoke.run_child([sys.executable, "-S", "-c", script], seconds) == expected


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A Hopper as far as the choice looks, with csrc and Triton; what the child would say is in `answers`."""
    library = tmp_path / "csrc.so"
    library.write_bytes(b"the extension")

    class Built:
        DEVICE, __file__ = "cuda", str(library)

    class Properties:
        name, major, minor = "NVIDIA H200", 9, 0

    class Device:
        answers, asked, capturing, patch, extension = {}, [], False, monkeypatch, library

    def run_child(command, seconds):
        *module, backend, index = command[1:]
        assert module == ["-m", "dsa_engine.ops.smoke"] and index == "0" and seconds == smoke.TIMEOUT_S
        Device.asked.append(backend)
        return Device.answers.get(backend, PASSED)

    monkeypatch.setattr(ops_cuda, "csrc", Built)
    monkeypatch.setattr(smoke, "run_child", run_child)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {
        "is_available": True,
        "current_device": 0,
        "is_current_stream_capturing": None,
        "get_device_properties": Properties(),
        "get_device_capability": (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *index, value=value: Device.capturing if value is None else value)
    smoke.identity.cache_clear()
    yield Device
    smoke.identity.cache_clear()


def chosen(call=CALL, requested="auto"):
    return dispatch.choose(call, requested, dispatch.supports).backend


def test_csrc_is_the_default_where_it_passed_and_is_asked_once(device):
    assert chosen() == "cuda" and chosen() == "cuda" and device.asked == ["cuda"]
    assert chosen(CALL._replace(stored=E4M3)) == "cuda" and device.asked == ["cuda"]


def test_csrc_is_left_out_where_it_failed_and_the_log_names_why(device, caplog):
    device.answers = {"cuda": FAILED}
    assert chosen() == "cudnn" and chosen(CALL._replace(stored=E4M3)) == "triton"
    assert device.asked == ["cuda", "cudnn"]
    assert "attention by cuda is not used on NVIDIA H200: its smoke test: wrong" in caplog.text
    device.answers["cudnn"] = FAILED
    smoke.verdict_path(smoke.identity("cudnn", 0)).unlink()
    assert chosen() == "triton"
    assert chosen(requested="cuda") == "cuda"  # whoever asks for it gets it


def test_the_order_is_csrc_flash3_cudnn_triton_on_a_hopper_alone(device):
    assert [candidate.backend for candidate in dispatch.candidates(CALL)] == ["cuda", "flash3", "cudnn", "triton"]
    for call in (CALL._replace(capability=(10, 0)), CALL._replace(capability=(8, 0)), CALL._replace(op="modulate")):
        assert [candidate.backend for candidate in dispatch.candidates(call)] == ["triton"]
    device.patch.setitem(dispatch.MEASURED, (9, 0), {"attention": "triton"})
    assert chosen() == "triton" and device.asked == []


def test_what_the_smoke_test_has_not_tried_stays_with_triton(device):
    """The small model that is shipped has head dim 32."""
    half = CALL._replace(dtype=torch.float16, stored=torch.float16)
    for call in (CALL._replace(head_dim=32), CALL._replace(dtype=torch.float32, stored=torch.float32), half):
        assert chosen(call) == "triton"
    assert chosen(CALL._replace(head_dim=64, stored=E4M3)) == "triton" and device.asked == []


def test_another_build_driver_or_device_is_asked_anew(device):
    chosen()
    device.extension.write_bytes(b"another build")
    smoke.identity.cache_clear()
    device.answers = {"cuda": FAILED}
    assert chosen() == "cudnn" and device.asked == ["cuda", "cuda", "cudnn"]
    key = smoke.identity("cuda", 0)
    assert len({smoke.verdict_path(key | {name: "another"}) for name in key}) == len(key) == 6


def test_no_child_is_started_in_a_capture(device, caplog):
    device.capturing = True
    assert chosen() == "triton" and device.asked == [] and "first called in a stream capture" in caplog.text
    device.capturing = False
    chosen()
    device.capturing = True
    assert chosen() == "cuda" and device.asked == ["cuda"]  # the verdict was kept


def test_a_file_that_is_broken_or_cannot_be_written_costs_no_more_than_the_question(device, caplog):
    path = smoke.verdict_path(smoke.identity("cuda", 0))
    chosen()
    assert json.loads(path.read_text())["device"] == "NVIDIA H200"
    path.write_text("{")
    assert chosen() == "cuda" and len(device.asked) == 2 and "is not readable" in caplog.text
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file where the folder should be")
    assert chosen() == "cuda" and "is not kept" in caplog.text


def test_doctor_says_the_order_the_choice_and_the_verdict(device):
    device.answers = {"cuda": FAILED}
    facts = doctor.attention()
    assert facts["order"] == "cuda, flash3 (flash_attn_interface is not installed), cudnn, triton"
    assert facts["runs"].startswith("cudnn: right on this device by its smoke test")
    assert facts["cuda"].startswith("its smoke test: wrong, kept in ") and "passed, kept in" in facts["cudnn"]
