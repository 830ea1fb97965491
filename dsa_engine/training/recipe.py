"""A training recipe as data: what each stage of a model's training runs for, read from a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dsa_engine.checks import check_int
from dsa_engine.config import RolloutConfig

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class CodecStage:
    """Batches of 32 frames."""

    steps: int = 5000


@dataclass(frozen=True)
class TeacherStage:
    """Flow matching with teacher forcing. batch: clips a step, over all processes; rate and muon: learning rates of
    AdamW and, for the matrices of the blocks, Muon, constant for 40 % of the steps and then falling; motion_weight: see
    `flow.weighted_error`; focus: share of the steps after which the clips are mostly those that are learned last."""

    steps: int = 6000
    batch: int = 16
    rate: float = 3e-3
    muon: float = 1.2e-2
    motion_weight: float = 0.0
    focus: float = 1.0


@dataclass(frozen=True)
class StudentStage:
    """Distribution matching distillation. batch: clips a step, over all processes; rate and critic_rate: of AdamW;
    critic_steps: updates of the critic to one of the student; guidance: of the teacher; motion_weight: see
    `flow.weighted_error` (critic) and `dmd.weight_motion`."""

    steps: int = 400
    batch: int = 16
    rate: float = 2e-4
    critic_rate: float = 5e-4
    critic_steps: int = 2
    guidance: float = 1.5
    motion_weight: float = 0.0


# The paper's 5 updates of the critic to one of the student, at a fifth of its rate (2e-6 and 4e-7 for its 1.3B).
PAPER = StudentStage(critic_steps=5, critic_rate=4e-5)


@dataclass(frozen=True)
class HeadStage:
    """The confidence heads of the frozen student. kind: which ships, `joint` or `refine`, trained with the student, or
    `fitted-pooled` or `fitted-token` now (`fitted` is the former name of the first); clips: whose rollouts these learn
    from, in iterations of 1024 frames; calibration_clips: others, that the thresholds of all come from."""

    kind: str = "fitted-pooled"
    clips: int = 512
    iterations: int = 600
    calibration_clips: int = 256


@dataclass(frozen=True)
class Recipe:
    """All stages of one model. `rollout` is what the student is distilled for and ships with; pool: clips that a
    process draws its batches from before it draws new ones."""

    name: str
    seed: int = 0
    pool: int = 4096
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    codec: CodecStage = field(default_factory=CodecStage)
    teacher: TeacherStage = field(default_factory=TeacherStage)
    student: StudentStage = field(default_factory=StudentStage)
    paper: StudentStage = PAPER
    head: HeadStage = field(default_factory=HeadStage)

    def replace(self, stage: str, **changes: Any) -> Recipe:
        """With some values of one stage changed; None leaves a value as it is. ValueError for one it does not have."""
        held = getattr(self, stage)
        changes = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(self, **{stage: _build(type(held), {**dataclasses.asdict(held), **changes}, stage)})


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    check_int("seed", seed, 0)
    return dataclasses.replace(recipe, seed=seed)


HEADS = ("joint", "refine", "fitted-pooled", "fitted-token")
STAGES = {
    "codec": CodecStage,
    "teacher": TeacherStage,
    "student": StudentStage,
    "paper": StudentStage,
    "head": HeadStage,
}
DEFAULTS = {"paper": PAPER}  # of stages whose defaults are not their class's


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(config: str | Path) -> Recipe:
    """A recipe by shipped name or from a TOML file. Errors name the file, the key and the keys there are."""
    path = FOLDER / f"{config}.toml" if str(config) in shipped() else Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"{config}: neither a shipped recipe ({', '.join(shipped())}) nor a TOML file")
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    stages = {}
    for name, kind in STAGES.items():
        given = dataclasses.asdict(DEFAULTS[name]) if name in DEFAULTS else {}
        stages[name] = _build(kind, given | values.pop(name, {}), f"{path}: [{name}]")
    rollout = RolloutConfig.from_dict(values.pop("rollout", {}))
    values.setdefault("name", path.stem)
    return _build(Recipe, {**values, "rollout": rollout, **stages}, str(path))


def _build(kind: type, values: Mapping[str, Any], where: str):
    """kind(**values), every key known and every value above 0 (weights and seeds may be 0)."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            near = get_close_matches(key, fields, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise ValueError(f"{where}: unknown key {key!r}; known are {', '.join(fields)}{hint}")
        if fields[key].type in ("int", "float"):
            low = 0 if key in ("seed", "motion_weight") else 1 if fields[key].type == "int" else None
            whole = fields[key].type == "int"
            wrong = isinstance(value, bool) or not isinstance(value, int if whole else (int, float))
            if wrong or (value < low if low is not None else value <= 0):
                rule = f"a whole number of at least {low}" if whole else f"a number {'>= 0' if low == 0 else '> 0'}"
                raise ValueError(f"{where}: {key}={value!r}: must be {rule}; nearest is {fields[key].default}")
    if kind is HeadStage and "kind" in values:
        values = {**values, "kind": HeadStage.kind if values["kind"] == "fitted" else values["kind"]}
        if values["kind"] not in HEADS:
            known = f"must be one of {', '.join(HEADS)}; nearest is {HeadStage.kind}"
            raise ValueError(f"{where}: kind={values['kind']!r}: {known}")
    return kind(**values)
