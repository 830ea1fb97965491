"""What a server is told at its start: where it listens, whom it lets in, what it takes and where it keeps its jobs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """host, port: where to listen; the default is this machine only. token: clients must send it as a bearer token,
    None for none. origins: of other web pages that may use the API (CORS), none by default. data: folder of the jobs'
    database and videos. body, prompt: the largest request in bytes and prompt in characters; frames: of the longest
    job, in pixel frames. start: seconds a WebSocket has to say what it wants; grace: seconds that running chunks get
    when the server stops.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    origins: tuple[str, ...] = ()
    data: Path = Path("dsa-engine-data")
    body: int = 16 * 2**20
    prompt: int = 4096
    frames: int = 2000
    start: float = 10.0
    grace: float = 3.0

    def __post_init__(self):
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port}: must be from 0 (any that is free) to 65535")
        if self.token is not None and not self.token.strip():
            raise ValueError("token='': must not be empty; leave it out for a server without one")
        for name in ("body", "prompt", "frames", "start", "grace"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be above 0")
