"""Jobs on disk: requests and results in a small SQLite file, videos and input images beside it.

    data/jobs.sqlite    one row per job
    data/videos/        <id>.mp4, written atomically (`Mp4Writer`)
    data/pictures/      <id>.png, the first frame that a job was given

Methods block for a short transaction and may be called from any thread.
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
from sqlmodel import Field, Session, SQLModel, col, select

from dsa_engine.files import atomic_write

ID = r"^video_[0-9a-f]{32}$"
STATES = ("queued", "in_progress", "completed", "failed")
FORMAT = 1  # of the tables, as SQLite's user_version

State = Literal["queued", "in_progress", "completed", "failed"]


class StorageError(OSError):
    """The disk is full, or gone."""


class Tables(SQLModel, registry=registry()):
    """Separate metadata: a program with other SQLModel tables does not get these among them."""


class Job(Tables, table=True):
    """Names of columns are the file's format: the field of column `order` is `request`, of `took` it is
    `duration_s`."""

    number: int | None = Field(default=None, primary_key=True)  # in the order of arrival
    id: str = Field(unique=True, index=True)
    status: str = Field(default="queued", index=True)
    model: str
    fps: float
    request: dict[str, Any] = Field(sa_type=JSON, sa_column_kwargs={"name": "order"})  # fields of `StreamRequest`
    picture: bool = False  # an image was given
    created: float  # times are in seconds since 1970
    completed: float | None = None
    duration_s: float | None = Field(default=None, sa_column_kwargs={"name": "took"})  # of making it
    steps: list[int] | None = Field(default=None, sa_type=JSON)
    confidence: list[list[float]] | None = Field(default=None, sa_type=JSON)
    error: str | None = None


class Store:
    """The jobs of one server. Raises ValueError for a folder that is not writable, that another server uses, or that
    another version of this program wrote."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.videos, self.pictures = self.folder / "videos", self.folder / "pictures"
        self._lock, self._open_ = threading.Lock(), True
        try:
            for path in (self.videos, self.pictures):
                path.mkdir(parents=True, exist_ok=True)
                with atomic_write(path / "test"):  # fail now, and not when the first job is done
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
        """Release the folder."""
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

    def read_image(self, id: str) -> np.ndarray:
        """uint8 [H, W, 3]."""
        from PIL import Image

        with Image.open(self._image_path(id)) as image:
            return np.asarray(image.convert("RGB"))

    def _image_path(self, id: str) -> Path:
        return self.pictures / f"{_checked(id)}.png"

    # Jobs.

    def add(self, request: dict[str, Any], model: str, fps: float, image: np.ndarray | None = None) -> Job:
        """A new queued job. The image is written before the row that refers to it."""
        job = Job(
            id=f"video_{secrets.token_hex(16)}",
            model=model,
            fps=fps,
            request=request,
            picture=image is not None,
            created=time.time(),
        )
        if image is not None:
            from PIL import Image

            try:
                with atomic_write(self._image_path(job.id)) as temporary:
                    Image.fromarray(image).save(temporary, "PNG")
            except OSError as error:
                raise StorageError(f"{self.pictures}: {error.strerror or error}") from error
        with self._transaction() as session:
            session.add(job)
        return job

    def get(self, id: str) -> Job | None:
        with self._transaction() as session:
            return session.exec(select(Job).where(Job.id == id)).first()

    def page(self, limit: int, after: str | None = None, newest: bool = True) -> tuple[list[Job], bool] | None:
        """At most `limit` jobs after job `after`, and whether there are more; None if there is no such job."""
        order = col(Job.number).desc() if newest else col(Job.number).asc()
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
        """The oldest queued job, now in progress."""
        with self._transaction() as session:
            job = session.exec(select(Job).where(Job.status == "queued").order_by(col(Job.number)).limit(1)).first()
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
        """After a start: queue again what was in progress and remove files without a job. Returns how many jobs."""
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
        for path in (self.video(id), self._image_path(id)):
            path.unlink(missing_ok=True)
        return True


def _prepare(connection: sqlite3.Connection, _) -> None:
    """An exclusive lock, which ends with the process: one server per file. Write-ahead log: a transaction that was cut
    off is rolled back."""
    for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL"):
        connection.execute(f"PRAGMA {pragma}")


def _checked(id: str) -> str:
    if re.fullmatch(ID, id) is None:
        raise ValueError(f"id={id!r}: is not one of a video; they look like video_ and 32 hex digits")
    return id
