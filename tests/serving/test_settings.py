"""The options of a server: limits, and flags that were renamed."""

from __future__ import annotations

import argparse
import sys

import pytest

from dsa_engine import cli
from dsa_engine.serving.settings import ServerOptions, Settings, WorkerLimits, add_flags


def parse(cls, *argv):
    parser = argparse.ArgumentParser()
    add_flags(parser, cls)
    return cls.parse(parser.parse_args([*map(str, argv)]))


@pytest.fixture(params=["serve", "ray"])
def options(request):
    """Of `dsa-engine serve` and of `ray_app`."""
    if request.param == "serve":
        return ServerOptions
    pytest.importorskip("ray", reason="needs the extra ray: pip install 'dsa-engine[ray]'")
    return pytest.importorskip("dsa_engine.serving.ray_app", exc_type=ImportError).Options


def test_old_names_of_flags_still_work_and_say_so(options, capsys):
    new = ("--max-sessions", 3, "--max-jobs", 2, "--queue", 1, "--idle-timeout", 5, "--origin", "a", "--origin", "b")
    old = ("--sessions", 3, "--jobs", 2, "--waiting", 1, "--idle", 5, "--origins", "a", "--origins", "b")
    expected = parse(options, *new)
    assert expected.limits == WorkerLimits(max_sessions=3, max_jobs=2, max_queue=1, idle_timeout=5.0)
    assert expected.settings.origins == ("a", "b") and not expected.fit and capsys.readouterr().err == ""
    assert parse(options, *old) == expected
    said = capsys.readouterr().err
    assert all(f"{was} is now called {now}\n" in said for was, now in zip(old[::2], new[::2]))


def test_every_option_of_a_server_is_one_on_ray(options):
    flags = (
        "--quantization",
        "fp8",
        "--vae",
        "taehv",
        "--rows",
        4,
        "--deterministic",
        "--token",
        "t",
        "--device",
        "cpu",
    )
    made = parse(options, *flags)
    assert (made.model.quantization, made.model.vae, made.limits.max_batch_rows) == ("fp8", "taehv", 4)
    assert (made.deterministic, made.settings.token, made.fit) == (True, "t", True)


@pytest.mark.parametrize(
    "wrong",
    [{"max_sessions": 0}, {"max_jobs": -1}, {"max_batch_rows": True}, {"idle_timeout": 0.0}, {"lifetime": -1.0}],
)
def test_limits_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WorkerLimits(**wrong)


@pytest.mark.parametrize("given", ["", " ", "\n"])
def test_an_empty_token_is_no_open_server(options, given, monkeypatch):
    monkeypatch.setenv("DSA_TOKEN", given)
    with pytest.raises(ValueError, match="token='': must not be empty"):
        parse(options)
    monkeypatch.delenv("DSA_TOKEN")
    with pytest.raises(ValueError, match="token='': must not be empty"):
        parse(options, f"--token={given}")
    assert parse(options).settings.token is None


@pytest.mark.parametrize(
    "given, words",
    [
        ("secret\n", "1 of its 7 characters are blanks or line ends"),
        (" secret\r\n", "3 of its 9 characters"),
        ("sec\nret", "control characters"),
        ("sec\0ret", "control characters"),
    ],
)
def test_a_token_that_nobody_can_send_is_refused_and_not_shown(given, words):
    with pytest.raises(ValueError, match=words) as error:
        Settings(token=given)
    assert "sec" not in str(error.value)


def test_the_token_of_the_environment_is_used(options, monkeypatch):
    monkeypatch.setenv("DSA_TOKEN", "one")
    assert parse(options).settings.token == "one" and parse(options, "--token", "two").settings.token == "two"


@pytest.mark.parametrize("wrong", [{"max_header": 0}, {"body_timeout": 0.0}, {"max_client_jobs": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_a_plain_install_is_told_what_serve_needs(monkeypatch, capsys):
    for name in ("dsa_engine.serving.server", "dsa_engine.serving.http.app"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("dsa_engine.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", "--port", "0"]) == 2
    assert "serve needs the extra serving: pip install 'dsa-engine[serving]'" in capsys.readouterr().err
