"""The smoke: what it calls right and wrong, on a CPU, where every backend is plain torch."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import smoke


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(part, ...): the exit code, and the file."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(smoke, "refuse_others", lambda *_: {})
    monkeypatch.setenv("DSA_BACKEND", "auto")

    def call(part, *argv):
        path = tmp_path / "smoke.json"
        code = smoke.main([part, "--model", "shapes", "--work", str(tmp_path / "work"), "--save", str(path), *argv])
        return code, json.loads(path.read_text())

    return call


def test_a_backend_is_right_within_twice_the_error_of_plain_torch(run, monkeypatch):
    """In bfloat16, as on a GPU; the reference is float32. Each part keeps what the others have written."""
    real, made = smoke.pipeline, []

    def rounded(*args):
        pipe = real(*args)
        for module in (pipe.engine.dit, pipe.engine.head):
            module.bfloat16()
        return pipe

    monkeypatch.setattr(smoke, "pipeline", rounded)
    code, found = run("torch")
    torch_ = found["parts"]["torch"]
    assert (
        code == 0 and 1e-3 < torch_["error"] < 0.2 and torch_["limit"] == pytest.approx(2 * torch_["error"], rel=0.05)
    )
    code, found = run("triton")
    assert code == 0 and found["parts"]["triton"]["error"] == pytest.approx(torch_["error"], rel=1e-3)
    latents = smoke.latents
    monkeypatch.setattr(smoke, "latents", lambda *args: made.append(latents(*args)) or 1.5 * made[-1])
    code, found = run("cuda")
    assert code == 1 and found["parts"]["cuda"]["status"] == "wrong" and found["parts"]["triton"]["status"] == "ok"
    assert made[0].dtype == torch.float32 and made[0].shape[:2] == (1, 6)
    monkeypatch.setattr(smoke, "latents", lambda *args: made[0] * float("nan"))
    assert run("triton")[0] == 1


def test_what_is_absent_and_what_fails(run, monkeypatch):
    code, found = run("loop")
    assert code == smoke.ABSENT and found["parts"]["loop"] == {"status": "absent", "why": "needs a CUDA device"}
    code, found = run("triton")
    assert code == 1 and "run the part torch first" in found["parts"]["triton"]["why"]

    def refuse(asked, device):
        raise SystemExit(f"asked for {asked}, got torch")

    monkeypatch.setattr(smoke, "refuse_others", refuse)
    for part, expected in (("triton", 1), ("cuda", smoke.ABSENT)):
        code, found = run(part)
        assert code == expected and found["parts"][part] == {"status": "absent", "why": f"asked for {part}, got torch"}


def test_latents_of_another_question_are_no_truth(run):
    assert run("torch")[0] == 0
    code, found = run("triton", "--seed", "1")
    assert code == 1 and "run the part torch again" in found["parts"]["triton"]["why"]
