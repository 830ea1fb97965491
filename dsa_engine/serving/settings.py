"""The options of a server: each is a dataclass field with its help, and the flags of `dsa-engine serve` and of
`python -m dsa_engine.serving.ray_app` are made from these fields."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from dsa_engine.checkpoints.families import FAMILIES
from dsa_engine.checks import check_int
from dsa_engine.models.fp8 import QUANTIZATIONS
from dsa_engine.pipeline import Pipeline
from dsa_engine.serving import origins

logger = logging.getLogger(__name__)

T = TypeVar("T")
MIN_BODY_RATE = 4096  # bytes a second
ABOVE_0 = (
    *("max_body", "max_header", "max_prompt", "max_frames", "max_client_jobs", "max_client_streams"),
    *("header_timeout", "body_timeout", "start_timeout", "grace"),
)


def flag(
    default: Any, help: str, type: Callable = str, name: str | None = None, old: tuple[str, ...] = (), **options: Any
) -> Any:
    """A dataclass field that is a command-line flag.

    Args:
        default: bool makes a switch, a tuple a flag that may be repeated.
        help: without the default, which is appended.
        type: converts the text.
        name: of the flag, if not the field's.
        old: earlier names, which still work.
        options: for `add_argument`, such as metavar and choices.
    """
    return field(default=default, metadata={"help": help, "type": type, "name": name, "old": old, "options": options})


def group(cls: type) -> Any:
    """A dataclass field that is a dataclass of flags."""
    return field(default_factory=cls, metadata={"group": cls})


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add the flags of a dataclass and of its groups; those left out are None in the namespace."""
    for f in fields(cls):
        meta = f.metadata
        if "group" in meta:
            add_flags(parser, meta["group"])
        if "help" not in meta:
            continue
        name = f"--{(meta['name'] or f.name).replace('_', '-')}"
        if isinstance(f.default, bool):
            options: dict[str, Any] = {"action": "store_true", "default": None}
        else:
            options = {"type": meta["type"], **meta["options"]}
            if isinstance(f.default, tuple):
                options["action"] = "append"
        default = "" if f.default in (None, (), False) else f" (default {f.default})"
        parser.add_argument(name, dest=f.name, help=meta["help"] + default, **options)
        for old in meta["old"]:
            renamed: dict[str, Any] = {"action": _Renamed, "new": name, "many": isinstance(f.default, tuple)}
            parser.add_argument(old, dest=f.name, type=meta["type"], default=argparse.SUPPRESS, **renamed)


class _Renamed(argparse.Action):
    """An old name of a flag: works like the new one, and says so."""

    def __init__(self, *args: Any, new: str, many: bool, **options: Any):
        super().__init__(*args, **{"help": argparse.SUPPRESS, **options})
        self.new, self.many = new, many

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        sys.stderr.write(f"{option_string} is now called {self.new}\n")
        before = getattr(namespace, self.dest, None) or []
        setattr(namespace, self.dest, [*before, values] if self.many else values)


def from_args(cls: Callable[..., T], args: argparse.Namespace) -> T:
    """The dataclass with the flags that were given. Raises ValueError for values out of range."""
    values: dict[str, Any] = {}
    for f in fields(cast(Any, cls)):
        if "group" in f.metadata:
            values[f.name] = from_args(f.metadata["group"], args)
        elif "help" in f.metadata and getattr(args, f.name) is not None:
            value = getattr(args, f.name)
            values[f.name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _threads(text: str) -> int:
    count = int(text)
    if not 1 <= count <= 1024:
        raise argparse.ArgumentTypeError(f"{count}: must be from 1 to 1024; nearest is {min(max(count, 1), 1024)}")
    return count


@dataclass(frozen=True)
class ModelOptions:
    """What is loaded, and where."""

    model: str = flag("shapes", "shipped name, folder or checkpoint")
    device: str | None = flag(None, "cpu, cuda, cuda:1 (default: cuda where there is one)")
    threads: int | None = flag(None, "CPU threads (default: 1 for a small model, else torch's own count)", _threads)
    family: str | None = flag(
        None, "whose chunks, window and schedule a checkpoint gets: " + ", ".join(FAMILIES), choices=tuple(FAMILIES)
    )
    head: str | None = flag(None, "another confidence head: a file, or a name such as token (shapes)", metavar="FILE")
    lora: str | None = flag(None, "an adapter to merge into a checkpoint: a file, or PEFT's folder", metavar="PATH")
    lora_strength: float | None = flag(None, "how much of it (default: 1, as it was trained)", float, metavar="X")
    vae: str | None = flag(
        None, "video VAE of a checkpoint, or wan | taehv (default: what lies in its folder)", metavar="PATH"
    )
    text: str | None = flag(None, "text encoder of a checkpoint, or prompts encoded before", metavar="PATH")
    offload: str | None = flag(None, "auto, or of text,vae: they live on the CPU and visit the device", metavar="PARTS")
    quantization: str | None = flag(
        None, "what is in FP8: GEMMs and cache, or one of them (compute capability 8.9)", choices=tuple(QUANTIZATIONS)
    )

    def load(self, max_sessions: int | None, **options: Any) -> Pipeline:
        names = ("device", "family", "head", "lora", "lora_strength", "vae", "text", "offload", "quantization")
        options |= {name: getattr(self, name) for name in names}
        return Pipeline.from_pretrained(self.model, max_sessions=max_sessions, **options)


@dataclass(frozen=True)
class Settings:
    """The HTTP side of a server. Raises ValueError for values out of range."""

    host: str = flag("127.0.0.1", "address to listen at; of this machine only where it is not given")
    port: int = flag(8000, "0 for any that is free", int)
    token: str | None = flag(
        None, "clients must send it as a bearer token (default: the environment's DSA_TOKEN, or none)"
    )
    origins: tuple[str, ...] = flag(
        (),
        "another page that may use the API, and a name of this server, e.g. https://example.com; repeatable",
        name="origin",
        old=("--origins",),
        metavar="URL",
    )
    data: Path = flag(Path("dsa-engine-data"), "the jobs' database and videos", Path, metavar="FOLDER")
    max_body: int = 16 * 2**20  # of a request, in bytes
    max_prompt: int = 4096  # in characters
    max_frames: int = 2000  # of a job, in pixel frames
    max_header: int = 32 * 2**10  # of a request, in bytes
    header_timeout: float = 10.0  # seconds until a connection must have sent a request's header
    body_timeout: float = 30.0  # seconds for a body; longer for one that comes faster than `MIN_BODY_RATE`
    start_timeout: float = 10.0  # seconds until a WebSocket must have sent session.start
    max_client_jobs: int = flag(500, "queued jobs of one client address", int, metavar="N")
    max_client_streams: int = flag(
        16, "live connections of one client address; those of this machine are not counted", int, metavar="N"
    )
    grace: float = 3.0  # seconds that running chunks get when the server stops

    def __post_init__(self):
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port}: must be from 0 (any that is free) to 65535")
        if self.token is not None:
            check_token(self.token)
        origins.listed(self.origins)  # raises for what is none
        for name in ABOVE_0:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be above 0")

    @property
    def allowed(self) -> tuple[str, ...]:
        """The origins, as browsers send them."""
        return origins.listed(self.origins)


def check_token(token: str) -> None:
    """Raises ValueError for a token that no client could send, without repeating it."""
    if not token.strip():
        raise ValueError(
            "token='': must not be empty; leave out --token and unset DSA_TOKEN for a server that is open to everybody"
        )
    blanks = len(token) - len(token.strip())
    if blanks:
        raise ValueError(
            f"token: {blanks} of its {len(token)} characters are blanks or line ends at its ends, which no client can "
            "send; leave them out"
        )
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in token):
        raise ValueError(f"token: of its {len(token)} characters some are control characters; leave them out")


@dataclass(frozen=True)
class WorkerLimits:
    """What one worker admits. Raises ValueError for values out of range."""

    max_sessions: int = flag(
        32, "live streams at once, fewer where the memory holds no more", int, old=("--sessions",), metavar="N"
    )
    max_jobs: int = flag(4, "jobs at once, 0 for none", int, old=("--jobs",), metavar="N")
    max_queue: int = flag(
        32, "live streams that may wait for a slot", int, name="queue", old=("--waiting",), metavar="N"
    )
    idle_timeout: float = flag(30.0, "seconds without a sign of a client", float, old=("--idle",), metavar="S")
    lifetime: float = flag(3600.0, "seconds of a live stream", float, metavar="S")
    max_batch_rows: int = flag(8, "sequences of one forward, at most", int, name="rows", metavar="N")
    steps: str | None = flag(
        None, "where a request does not say: budget, dsa, relative, fixed, a preset or as generate's", metavar="POLICY"
    )  # None: "budget", or "fixed" for a model without a confidence head

    def __post_init__(self):
        for name, low in (("max_sessions", 1), ("max_jobs", 0), ("max_queue", 0), ("max_batch_rows", 1)):
            check_int(name, getattr(self, name), low)
        for name in ("idle_timeout", "lifetime"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name}={value!r}: must be a number of seconds above 0, e.g. 30")

    @property
    def slots(self) -> int:
        """Cache slots that this needs."""
        return self.max_sessions + self.max_jobs

    def within(self, slots: int) -> WorkerLimits:
        """The same limits for no more than `slots` sessions and jobs, in the same proportion but with at least one of
        each where possible. Logs a warning if that is fewer than asked for."""
        if slots >= self.slots:
            return self
        jobs = min(self.max_jobs, max(1, slots * self.max_jobs // self.slots), slots - 1)
        bounded = replace(self, max_sessions=slots - jobs, max_jobs=jobs)
        logger.warning(
            "%d live streams and %d jobs at once instead of %d and %d: the device's memory holds %d; "
            "--max-sessions and --max-jobs ask for others",
            bounded.max_sessions,
            bounded.max_jobs,
            self.max_sessions,
            self.max_jobs,
            slots,
        )
        return bounded


@dataclass(frozen=True)
class ServerOptions:
    """Everything that a server is started with."""

    model: ModelOptions = group(ModelOptions)
    settings: Settings = group(Settings)
    limits: WorkerLimits = group(WorkerLimits)
    deterministic: bool = flag(False, "a video's bits never depend on what else runs; no batching")
    fit: bool = True  # fewer sessions and jobs where the memory holds no more; not if their number was given

    @classmethod
    def parse(cls, args: argparse.Namespace) -> ServerOptions:
        """Raises ValueError for values out of range."""
        if args.token is None:  # an empty variable is a mistake, not a server that is open
            args.token = os.environ.get("DSA_TOKEN")
        return replace(from_args(cls, args), fit=args.max_sessions is args.max_jobs is None)

    def load(self) -> tuple[Pipeline, WorkerLimits]:
        """The pipeline, and the limits that fit."""
        limits = self.limits
        pipe = self.model.load(None if self.fit else limits.slots, deterministic=self.deterministic)
        if self.fit:
            limits = limits.within(pipe.make_room(limits.slots))
        torch.set_num_threads(self.model.threads or pipe.cpu_threads)
        return pipe, limits
