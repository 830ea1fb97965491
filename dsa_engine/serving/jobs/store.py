"""Jobs on disk: what was ordered and how it went in a small SQLite file, videos and given pictures beside it.

    data/jobs.sqlite    one row a job
    data/videos/        <id>.mp4, each there as a whole or not at all (`video.Mp4Writer`)
    data/pictures/      <id>.png, what a job was given to begin with

Methods block for the length of a short transaction and may be called from any thread.
"""

from __future__ import annotations

import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sqlalchemy import JSON, Engine, create_engine, event, func
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import registry
from sqlalchemy.pool import StaticPool
from sqlmodel import Field, Session, SQLModel, select

from dsa_engine.files import atomic_write

ID = r"^video_[0-9a-f]{32}$"
STATES = ("queued", "in_progress", "completed", "failed")
FORMAT = 1  # of the tables, as SQLite's user_version

State = Literal["queued", "in_progress", "completed", "failed"]


class StorageError(OSError):
    """The disk is full, or gone."""


class Tables(SQLModel, registry=registry()):
    """Tables of their own: a program that has others with SQLModel does not get these among them."""


class Job(Tables, table=True):
    """number: jobs in the order in which they came; order: the fields of `types.StreamRequest` that make the video; picture:
    it was given one; times: seconds since 1970; took: seconds that making it took."""

    number: int | None = Field(default=None, primary_key=True)
    id: str = Field(unique=True, index=True)
    status: str = Field(default="queued", index=True)
    model: str
    fps: float
    request: dict[str, Any] = Field(sa_type=JSON, sa_column_kwargs={"name": "order"})
    picture: bool = False
    created: float
    completed: float | None = None
    duration_s: float | None = Field(default=None, sa_column_kwargs={"name": "took"})
    steps: list[int] | None = Field(default=None, sa_type=JSON)
    confidence: list[list[float]] | None = Field(default=None, sa_type=JSON)
    error: str | None = None


class Store:
    """The jobs of one server. Raises ValueError for a folder that cannot be written to, that another server uses, or
    that another version of this program wrote."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.videos, self.pictures = self.folder / "videos", self.folder / "pictures"
        self._lock, self._open_ = threading.Lock(), True
        try:
            for path in (self.videos, self.pictures):
                path.mkdir(parents=True, exist_ok=True)
                with atomic_write(path / "test"):  # now, and not when the first job is done
                    pass
                (path / "test").unlink()
        except OSError as error:
            raise ValueError(f"data={str(folder)!r}: cannot be written to ({error}); give another folder") from error
        self._engine = self._open()

    def _open(self) -> Engine:
        path = self.folder / "jobs.sqlite"
        engine = create_engine(
            f"sqlite:///{path}", poolclass=StaticPool, connect_args={"check_same_thread": False, "timeout": 1.0}
        )
        event.listen(engine, "connect", _prepare)
        try:
            with engine.begin() as connection:
                found = connection.exec_driver_sql("PRAGMA user_version").scalar()
                if found not in (0, FORMAT):
                    raise ValueError(f"{path}: is of format {found}, this version writes {FORMAT}; give another folder")
                Tables.metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {FORMAT}")
        except Exception as error:
            engine.dispose()
            if isinstance(error, ValueError):
                raise
            why = "another server uses it" if "locked" in str(error) else str(getattr(error, "orig", error))
            raise ValueError(f"{path}: cannot be opened ({why}); give another folder") from error
        return engine

    def close(self) -> None:
        """Let another server have the folder."""
        with self._lock:
            self._open_ = False
            self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with self._lock, Session(self._engine, expire_on_commit=False) as session:
            if not self._open_:
                raise StorageError(f"{self.folder}: is closed")
            try:
                yield session
                session.commit()
            except OperationalError as error:
                raise StorageError(f"{self.folder / 'jobs.sqlite'}: {error.orig}") from error

    # Files.

    def video(self, id: str) -> Path:
        return self.videos / f"{_checked(id)}.mp4"

    def read_picture(self, id: str) -> np.ndarray:
        """uint8 [H, W, 3]."""
        from PIL import Image

        with Image.open(self._picture(id)) as picture:
            return np.asarray(picture.convert("RGB"))

    def _picture(self, id: str) -> Path:
        return self.pictures / f"{_checked(id)}.png"

    # Jobs.

    def add(self, request: dict[str, Any], model: str, fps: float, picture: np.ndarray | None = None) -> Job:
        """A new job, queued. The picture's file is there before the row that tells of it."""
        job = Job(
            id=f"video_{secrets.token_hex(16)}",
            model=model,
            fps=fps,
            request=request,
            picture=picture is not None,
            created=time.time(),
        )
        if picture is not None:
            from PIL import Image

            try:
                with atomic_write(self._picture(job.id)) as temporary:
                    Image.fromarray(picture).save(temporary, "PNG")
            except OSError as error:
                raise StorageError(f"{self.pictures}: {error.strerror or error}") from error
        with self._transaction() as session:
            session.add(job)
        return job

    def get(self, id: str) -> Job | None:
        with self._transaction() as session:
            return session.exec(select(Job).where(Job.id == id)).first()

    def page(self, limit: int, after: str | None = None, newest: bool = True) -> tuple[list[Job], bool] | None:
        """At most `limit` jobs, and whether there are more; after: begin behind this job; None if there is no such."""
        order = Job.number.desc() if newest else Job.number.asc()
        query = select(Job).order_by(order).limit(limit + 1)
        with self._transaction() as session:
            if after is not None:
                number = session.exec(select(Job.number).where(Job.id == after)).first()
                if number is None:
                    return None
                query = query.where(Job.number < number if newest else Job.number > number)
            jobs = session.exec(query).all()
        return list(jobs[:limit]), len(jobs) > limit

    def counts(self) -> dict[str, int]:
        """Jobs in each state."""
        with self._transaction() as session:
            found = dict(session.exec(select(Job.status, func.count()).group_by(Job.status)).all())
        return {state: found.get(state, 0) for state in STATES}

    def claim(self) -> Job | None:
        """The oldest queued job, in progress from now on."""
        with self._transaction() as session:
            job = session.exec(select(Job).where(Job.status == "queued").order_by(Job.number).limit(1)).first()
            if job is not None:
                job.status = "in_progress"
        return job

    def update(self, id: str, **changes: Any) -> None:
        """Change fields of a job."""
        with self._transaction() as session:
            job = session.exec(select(Job).where(Job.id == id)).first()
            if job is not None:
                job.sqlmodel_update(changes)

    def recover(self) -> int:
        """After a start: what was in progress is queued again, and files that nobody will finish go. How many were."""
        with self._transaction() as session:
            jobs = session.exec(select(Job).where(Job.status == "in_progress")).all()
            for job in jobs:
                job.status = "queued"
            known = {job.id for job in session.exec(select(Job)).all()}
        for path in (*self.videos.iterdir(), *self.pictures.iterdir()):
            if path.stem not in known and re.match(r"\.?video_", path.name):
                path.unlink()
        return len(jobs)

    def delete(self, id: str) -> bool:
        """The job and its files; False where there is none."""
        with self._transaction() as session:
            job = session.exec(select(Job).where(Job.id == id)).first()
            if job is None:
                return False
            session.delete(job)
        for path in (self.video(id), self._picture(id)):
            path.unlink(missing_ok=True)
        return True


def _prepare(connection: sqlite3.Connection, _) -> None:
    """One server a file, for its lock dies with the process; and a log ahead of the file, so that a transaction that
    was cut off never was."""
    for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL"):
        connection.execute(f"PRAGMA {pragma}")


def _checked(id: str) -> str:
    if re.fullmatch(ID, id) is None:
        raise ValueError(f"id={id!r}: is not one of a video; they look like video_ and 32 hex digits")
    return id
