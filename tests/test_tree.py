"""The house stays readable: short files, short folders, and the field's terms as public names."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = (".py", ".cu", ".cuh", ".cpp", ".h", ".js", ".html", ".css", ".sh")
MAX_LINES, MAX_FILES = 400, 16
# Public names that said something else than the field says; each has a term of the field now.
DIALECT = {
    *("StepInputs", "StepGraphs", "Launch", "Batcher", "Want", "Turn", "CacheRows", "GivenNoise", "GuidedNoise"),
    *("Rowwise", "Projection", "Found", "Dialect", "Parts", "Codec", "Loan", "HomeStream", "TinyVAE", "Held"),
    *(
        "Order",
        "Card",
        "Made",
        "Applied",
        "Refused",
        "Busy",
        "Task",
        "Pace",
        "Governor",
        "Conversation",
        "Over",
    ),
    *("Wanted", "Said", "Lost", "Told", "Answer", "Kept", "Keeper", "Snapshots", "Sticky", "Unstorable", "Rollouts"),
    *("Rolled", "Contestant", "Regime", "Site", "Facts", "Witness", "Line", "Storm", "Unequal"),
    *(
        "told",
        "took",
        "taken",
        "wanted",
        "judge",
        "judged",
        "lacks",
        "numbers",
        "multiprocessors",
        "likeness",
    ),
    *("replacing", "check_target", "joint", "one_product", "side_by_side", "send_home", "lend", "hand_over"),
}


def code() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive: everything that lies there
        listed = [
            str(p.relative_to(ROOT)) for top in ("dsa_engine", "csrc", "tests") for p in (ROOT / top).rglob("*.*")
        ]
    return [path for name in listed if (path := ROOT / name).suffix in CODE and path.exists()]


def test_no_file_is_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in code()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_folder_is_crowded():
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in code() if path.name != "__init__.py")
    del folders["csrc"]  # flat: an op is one stem
    assert {folder: files for folder, files in folders.items() if files > MAX_FILES} == {}


def public_names(source: str) -> set[str]:
    """Classes, functions, methods and fields that a module offers."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
            body = node.body if isinstance(node, ast.ClassDef) else []
            found |= {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return found


def test_public_names_are_the_fields_terms():
    found = {}
    for path in code():
        if path.suffix == ".py" and "tests" not in path.relative_to(ROOT).parts:
            for name in public_names(path.read_text()) & DIALECT:
                found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert found == {}


def test_a_name_is_seen():
    assert public_names("class Order:\n    told: int\n    def took(self): ...") == {"Order", "told", "took"}
