"""`dsa-engine doctor`: what is installed, what is missing, and whether the engine and the video encoder do run."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsa_engine.checkpoints.load import shipped_models
from dsa_engine.cli.options import Result, table
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.engine.engine import Engine
from dsa_engine.media import mp4
from dsa_engine.models.confidence import PooledHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.fp8 import unavailable
from dsa_engine.ops import dispatch, smoke
from dsa_engine.ops.support import Call
from dsa_engine.pipeline import Pipeline

REQUIRED = ("dsa-engine", "torch", "numpy", "safetensors", "av", "matplotlib", "tqdm")
EXTRAS = {  # which extra of pyproject.toml brings an optional package
    "cuda": ("triton", "cuda-python"),
    "flash": ("flash-attn",),
    "models": ("transformers", "ftfy", "sentencepiece"),
    "serving": ("fastapi", "uvicorn", "pydantic", "sqlmodel", "prometheus-client", "python-multipart"),
    "ray": ("ray",),
    "train": ("scipy",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No flags but --json."""


def run(args: argparse.Namespace) -> Result:
    """What is installed, what is missing, and whether the engine and the video encoder do run."""
    cuda = torch.cuda.is_available()
    cudnn = torch.backends.cudnn.version() if cuda else None
    optional = {}
    for extra, names in EXTRAS.items():
        for name in names:
            optional[name] = version(name) or f"missing; it comes with dsa-engine[{extra}]"
    works, fails = {}, {}
    checks: dict[str, Callable[[], str]] = {"video": try_video, "engine": try_engine}
    checks |= {f"model {name}": partial(try_model, name) for name in shipped_models()}
    for name, check in checks.items():
        try:
            works[name] = check()
        except Exception as error:  # whatever a broken installation raises is the diagnosis
            fails[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    warnings = known_problems(torch.__version__, cudnn)
    if not shipped_models():
        warnings.append("no model comes with this installation; generate needs --model FOLDER")
    required = {name: version(name) or "not installed" for name in REQUIRED}
    facts = {
        "ok": not fails,
        "versions": {"python": platform.python_version()} | required,
        "device": device_facts() | {"cudnn": cudnn},
        "fp8": unavailable("cuda" if cuda else "cpu") or ("in hardware" if cuda else "only its values, on a CPU"),
        "ops": backends("cuda" if cuda else "cpu"),
        **({"attention": attention()} if cuda else {}),
        "optional": optional,
        "models": shipped_models(),
        "works": works,
        "warnings": warnings,
        "fails": fails,
    }
    verdict = "the engine runs here" if not fails else f"the engine does not run here: {', '.join(fails)}"
    return facts, [*table({k: v for k, v in facts.items() if k != "ok"}), verdict], int(bool(fails))


def backends(device: str) -> dict[str, str]:
    """For each op, which implementation runs on a kind of device, and why."""
    chosen = {op: dispatch.choice(op, device) for op in dispatch.GROUP_OF}
    return {op: f"{backend}: {why}" for op, (backend, why) in chosen.items()}


def attention() -> dict[str, str]:
    """What a GPU tries for attention in the model's usual dtype, in order, what it runs, and their smoke tests."""
    index = torch.cuda.current_device()
    call = Call("attention", torch.cuda.get_device_capability(index), torch.bfloat16, 128, torch.bfloat16, index)
    tried = dispatch.candidates(call)
    reasons = {candidate.backend: dispatch.supports(candidate.backend, call) for candidate in tried}
    facts = {"order": ", ".join(f"{b} ({r.text})" if r else b for b, r in reasons.items())}
    facts["runs"] = ": ".join(dispatch.choose(call, os.environ.get("DSA_BACKEND", "auto"), dispatch.supports))
    for backend, _, smoke_test in tried:  # csrc's in any case, the others' where they were asked
        if smoke_test and reasons[backend] is None:
            path = smoke.verdict_path(smoke.identity(backend, index))
            found = smoke.verdict(backend, index) if backend == "cuda" else smoke.read(path)
            facts[backend] = f"{found.text}, kept in {path}" if found else "its smoke test was not needed"
    return facts


def version(name: str) -> str | None:
    """Of an installed package, from its metadata: nothing is imported, so nothing broken can take doctor down."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def device_facts() -> dict[str, Any]:
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        return {"device": "cpu", "why": why, "threads": torch.get_num_threads()}
    gpu = torch.cuda.get_device_properties(0)
    return {
        "device": "cuda",
        "name": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "memory_gib": round(gpu.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def known_problems(torch_version: str, cudnn: int | None) -> list[str]:
    """cudnn: as torch gives it, 91002 for 9.10.2. Source: pytorch issues 166643 and 174051."""
    if torch_version.startswith("2.9.") and cudnn is not None and cudnn < 91500:
        return [f"torch {torch_version} with cuDNN {cudnn}: bf16 Conv3d takes 3x the memory; use cuDNN 9.15 or newer"]
    return []


def try_video() -> str:
    """Encode two tiny frames with the very writer of `generate`, and read them back."""
    frames = np.stack([np.full((16, 16, 3), level, dtype=np.uint8) for level in (60, 180)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "two.mp4"
        mp4.write_mp4(path, frames, fps=2)
        back, _ = mp4.read_mp4(path)
    if back.shape != frames.shape or np.abs(back.astype(int) - frames).max() > 8:
        raise RuntimeError("H.264 does not give back the frames that went in")
    return "libx264 through PyAV"


def try_engine() -> str:
    """Two chunks of the smallest preset with random weights: every op of the chosen backend on the default device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = ModelConfig.preset("shapes")
    dit = CausalDiT(model).to(device, dtype).requires_grad_(False)
    head = PooledHead(model).to(device, dtype).requires_grad_(False)
    engine = Engine(dit, head, None, None, RolloutConfig())
    pipe = Pipeline(engine, name="random", height=64, width=64, frames=6, fps=12.0)
    start = time.perf_counter()
    latents = pipe.generate_latents(torch.randn(1, 6, model.in_dim, 8, 8), torch.zeros(1, 1, model.text_dim))
    if not latents.isfinite().all():
        raise RuntimeError("a random model gives values that are not finite")
    return f"2 chunks of a random small model in {1e3 * (time.perf_counter() - start):.0f} ms on {device}"


def try_model(name: str) -> str:
    with Pipeline.from_pretrained(name) as pipe:
        return f"loads: {sum(p.numel() for p in pipe.engine.dit.parameters()):,} parameters in its generator"
