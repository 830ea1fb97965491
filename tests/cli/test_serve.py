"""`dsa-engine serve`: what the flags become."""

from __future__ import annotations

from dsa_engine import cli
from dsa_engine.pipeline import Pipeline


def test_a_server_that_nobody_told_how_many_makes_room_for_what_fits(model, monkeypatch):
    """Then, and only then, are places bounded by the memory there is."""
    asked, served = [], []
    load = Pipeline.from_pretrained
    monkeypatch.setattr(
        Pipeline,
        "from_pretrained",
        lambda *args, **options: asked.append(options["max_sessions"]) or load(*args, **options),
    )
    monkeypatch.setattr(Pipeline, "make_room", lambda pipe, wanted: setattr(pipe.engine, "max_sessions", 9) or 9)
    monkeypatch.setattr("dsa_engine.serving.server.run", lambda pipe, limits, *_: served.append(limits))
    for flags in ((), ("--max-jobs", 2)):
        assert cli.main(["serve", "--model", str(model), "--device", "cpu", "--port", "0", *map(str, flags)]) == 0
    assert asked == [None, 34]
    assert [(limits.max_sessions, limits.max_jobs) for limits in served] == [(8, 1), (32, 2)]
