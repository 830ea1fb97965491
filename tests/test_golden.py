"""The shipped model makes the clips that it made before: `generate_latents` for three prompts, three policies.

`golden/latents.safetensors` was written by `python tests/test_golden.py` at commit 986a2f4 (float32, one thread, the
AVX2 code of torch and oneDNN). Where torch and its instruction set are the file's, the bits are equal; elsewhere sums
are made in another order, and the relative error is bounded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).parent / "golden" / "latents.safetensors"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}
FRAMES, SHAPE = 12, (16, 8, 8)  # of the noise: latent frames; channels, height and width
CLIPS = (  # prompt, seed, step policy
    ("a red circle moves sideways on black", 0, "fixed:4"),
    ("a blue square moves up and down on gray", 1, "balanced"),
    ("a yellow cross moves sideways on navy", 2, "confidence:0.7"),
)


def generate(path: Path) -> None:
    """Writes the three clips' latents and what they were made with."""
    import torch
    from safetensors.torch import save_file

    from dsa_engine import Pipeline

    torch.set_num_threads(1)
    pipe = Pipeline.from_pretrained("shapes", device="cpu")
    tensors = {}
    for number, (prompt, seed, policy) in enumerate(CLIPS):
        noise = torch.randn(1, FRAMES, *SHAPE, generator=torch.Generator().manual_seed(seed))
        embeds = pipe.engine.encode([prompt])
        tensors[f"clip{number}"] = pipe.generate_latents(noise, embeds, step_policy=policy, seed=seed)
    made = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    save_file(tensors, path, metadata={"made": json.dumps(made)})


def read(path: Path) -> tuple[dict, dict]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["made"])


def test_the_shipped_model_makes_the_clips_that_it_made(tmp_path):
    path = tmp_path / "latents.safetensors"
    subprocess.run([sys.executable, __file__, str(path)], env=os.environ | AVX2, check=True, timeout=600)
    clips, made = read(path)
    golden, golden_made = read(FILE)
    assert clips.keys() == golden.keys()
    for name, clip in clips.items():
        if made == golden_made:
            assert clip.equal(golden[name]), name
        else:
            assert (clip - golden[name]).norm() < 1e-4 * golden[name].norm(), name


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
