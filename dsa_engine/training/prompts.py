"""Prompts from a file: texts for a model with a text encoder, embeddings for one without."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dsa_engine.checkpoints.tensor_io import read_tensors

TENSOR = "prompt_embeds"
KINDS = f"a .txt file (a prompt a line) or a .safetensors file with a tensor {TENSOR} [P, L, text_dim]"


def read_prompts(path: str | Path) -> list[str] | Tensor:
    """The prompts of a .txt file, a line each, or the tensor `prompt_embeds` [P, L, text_dim] of a .safetensors file.

    Blank lines and lines that begin with # are passed over. A tensor [P, chunks, L, text_dim] has a prompt for every
    chunk. Raises FileNotFoundError, or ValueError naming the file and what was expected in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected is {KINDS}")
    if path.suffix == ".txt":
        return _read_lines(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: ends in {path.suffix or 'nothing'}; expected is {KINDS}")
    tensors = read_tensors(path)
    if TENSOR not in tensors:
        raise ValueError(f"{path}: holds {', '.join(sorted(tensors)) or 'nothing'}; expected is a tensor {TENSOR}")
    embeds = tensors[TENSOR]
    if embeds.ndim not in (3, 4) or not embeds.is_floating_point() or 0 in embeds.shape:
        raise ValueError(
            f"{path}: {TENSOR} is {embeds.dtype} {list(embeds.shape)}; must be floating point [P, L, text_dim] or "
            "[P, chunks, L, text_dim] with at least one prompt"
        )
    return embeds


def _read_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error})") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; expected is one a line")
    return prompts
