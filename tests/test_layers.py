"""Imports point down only: the layers of the package, read from its sources with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dsa_engine"

# Lowest first. A unit imports only from lower rows; the units of one row know nothing of each other.
ROWS = (
    ("config", "kernel_types"),
    ("csrc", "triton_kernels"),
    ("ops",),
    ("models",),
    ("checkpoints",),
    ("sampling",),
    ("engine",),
    ("pipeline_inputs", "pipeline_outputs"),
    ("loaded_model",),
    ("pipeline",),
    ("evaluation",),
    ("serving", "training"),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {unit: rank for rank, row in enumerate(ROWS) for unit in row}
LEAVES = ("checks", "files", "media", "shapes", "assets")  # open to all; import only config and each other
# Not needed to import the package; each is imported where it is used.
OPTIONAL = ("diffusers", "transformers", "fastapi", "uvicorn", "ray", "av", "matplotlib", "triton")


def unit_of(module: str) -> str:
    """`dsa_engine.ops.norm_rope` -> ops; the package itself -> __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(source: str, module: str, is_package: bool = False):
    """(line, dotted name) of everything of the package that a source imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = module.split(".")
                anchor = anchor[: len(anchor) - node.level + is_package]
                base = ".".join([*anchor, *([node.module] if node.module else [])])
            # `from dsa_engine import ops` names a unit, `from dsa_engine import Pipeline` asks the package itself
            names = [f"{base}.{a.name}" if is_unit(f"{base}.{a.name}") else base for a in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "dsa_engine")


def is_unit(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 2 and parts[0] == "dsa_engine" and (parts[1] in RANK or parts[1] in LEAVES)


def allowed(importer: str, target: str) -> bool:
    if importer == target or target == "config":
        return True
    if importer in LEAVES:
        return target in LEAVES
    return target in LEAVES or RANK[target] < RANK[importer]


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    importer, found = unit_of(module), []
    for line, name in imported(source, module, is_package):
        target = unit_of(name)
        if target not in RANK and target not in LEAVES:
            found.append(f"{module}:{line} imports {name}, which has no layer")
        elif not allowed(importer, target):
            found.append(f"{module}:{line} ({importer}) imports {name} ({target})")
    return found


def sources():
    """(path, dotted module name, is a package) of every Python file of the package."""
    for folder, prefix in ((PACKAGE, "dsa_engine"), (ROOT / "triton_kernels", "dsa_engine.triton_kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            yield path, ".".join((prefix, *(parts[:-1] if is_package else parts))), is_package


def test_every_file_belongs_to_a_layer():
    placed = {*RANK, *LEAVES}
    assert [module for _, module, _ in sources() if unit_of(module) not in placed] == []


def test_imports_point_down():
    found = [v for path, module, is_package in sources() for v in violations(path.read_text(), module, is_package)]
    assert found == []


def test_no_cycle_of_modules():
    files = [(module, path.read_text(), is_package) for path, module, is_package in sources()]
    known = {module for module, *_ in files}
    edges = {module: targets(source, module, known, is_package) - {module} for module, source, is_package in files}
    assert cycles(edges) == []


def targets(source: str, module: str, known: set[str], is_package: bool = False) -> set[str]:
    """The modules of the package that a source imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = {f"{node.module}.{a.name}" for a in node.names} - {
                "dsa_engine.csrc"
            }  # csrc: the compiled extension
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import each other: what is left when those without imports are taken away, again and
    again."""
    edges = {module: set(names) for module, names in edges.items()}
    for reverse in (False, True):
        while free := {m for m in edges if not (any(m in e for e in edges.values()) if reverse else edges[m])}:
            edges = {module: names - free for module, names in edges.items() if module not in free}
    return [sorted(edges)] if edges else []


def test_a_cycle_is_seen():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("dsa_engine.ops.x", "from dsa_engine.models.dit import CausalDiT"),
        ("dsa_engine.ops.x", "from dsa_engine import models"),
        ("dsa_engine.models.x", "import dsa_engine.sampling.kv_cache"),
        ("dsa_engine.models.x", "from ..sampling import cache"),
        ("dsa_engine.models.x", "def f():\n    from dsa_engine.engine import session"),
        ("dsa_engine.engine.x", "from dsa_engine import Pipeline"),
        ("dsa_engine.engine.x", "import dsa_engine"),
        ("dsa_engine.serving.x", "from dsa_engine.training.trainer import train"),
        ("dsa_engine.config", "from dsa_engine.ops import attention"),
        ("dsa_engine.media.mp4", "from dsa_engine.models.wan_vae import Decoder"),
        ("dsa_engine.triton_kernels.x", "from dsa_engine.ops.reference import attention"),
        ("dsa_engine.training.x", "from dsa_engine.unheard_of import thing"),
    ],
)
def test_the_rule_sees_a_violation(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("dsa_engine.models.x", "import torch\nfrom dsa_engine import ops\nfrom dsa_engine.config import ModelConfig"),
        ("dsa_engine.models.x", "from .rope import rope_table\nfrom . import dit\nfrom ..ops import attention"),
        ("dsa_engine.models.x", "from dsa_engine.shapes.world import Caption"),
        ("dsa_engine.training.x", "from dsa_engine.pipeline import Pipeline\nfrom dsa_engine import engine, models"),
        ("dsa_engine.shapes.metrics", "from dsa_engine.shapes import world\nfrom dsa_engine.config import ModelConfig"),
        ("dsa_engine.cli", "from dsa_engine.serving.http.app import serve\nfrom dsa_engine.training import trainer"),
    ],
)
def test_the_rule_lets_downward_imports_pass(module, source):
    assert violations(source, module) == []


def test_a_relative_import_in_a_package_is_read_from_the_package():
    assert violations("from . import cache", "dsa_engine.sampling", is_package=True) == []
    assert len(violations("from ..engine import session", "dsa_engine.sampling", is_package=True)) == 1


def test_optional_libraries_are_not_imported_with_the_package():
    """What torch itself brings along is not counted."""
    layers = ("config", "ops", "models", "sampling", "engine", "pipeline")
    modules = ["dsa_engine", *(m for _, m, _ in sources() if unit_of(m) in layers)]
    script = (
        "import sys, importlib, torch, numpy, safetensors.torch\n"
        "before = set(sys.modules)\n"
        f"for module in {modules!r}: importlib.import_module(module)\n"
        f"print(*sorted((sys.modules.keys() - before) & set({OPTIONAL!r})))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr
