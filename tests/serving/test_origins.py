"""Hosts and origins: which are the same, which are a server's own."""

from __future__ import annotations

import pytest

from dsa_engine.serving import origins


@pytest.mark.parametrize(
    "given, same",
    [
        ("https://video.example", "https://video.example"),
        ("HTTPS://Video.Example", "https://video.example"),
        ("https://video.example:443", "https://video.example"),
        ("http://video.example:80", "http://video.example"),
        ("https://video.example:80", "https://video.example:80"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://[::1]:80", "http://[::1]"),
        ("http://video.example.", "http://video.example"),
        ("http://a:08000", "http://a:8000"),
    ],
)
def test_one_form_of_an_origin(given, same):
    assert origins.normalized(given) == same == origins.normalized(same)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "null",
        "video.example",
        "ftp://a",
        "http://",
        "http://a/b",
        "http://a?b",
        "http://u@a",
        "http://[",
        "http://[x]",
    ]
    + ["http://a:", "http://a:99999", "http://a b", "http://a,b", "file:///x", "http://::1"],
)
def test_what_is_no_origin(wrong):
    with pytest.raises(ValueError, match="scheme://host"):
        origins.normalized(wrong)


def test_what_may_be_given_as_origin():
    given = ("https://A.example/", "b.example", "c:8443", "*", " http://d:80 ")
    assert origins.listed(given) == (
        *("https://a.example", "http://b.example", "https://b.example"),
        *("http://c:8443", "https://c:8443", "*", "http://d"),
    )


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ("https://a.example/app/", "https://a.example"),
        ("a.example/app", "https://a.example"),
        ("http://a:80/x?y#z", "http://a"),
        ("wss://a.example:8443", "https://a.example:8443"),
        ("null", None),
        ("", None),
        ("http://[", None),
    ],
)
def test_what_may_not_names_the_nearest(wrong, nearest):
    if wrong == "null":  # is a host of that name, and never what a page without a host sends
        assert not origins.origin_allowed("null", (), origins.listed(("null",)))
        return
    with pytest.raises(ValueError, match="origin=") as error:
        origins.listed((wrong,))
    assert str(error.value).endswith(f"nearest is {nearest}" if nearest else "e.g. https://video.example")


@pytest.mark.parametrize(
    "origin, hosts, allowed",
    [
        (None, ("anything",), True),
        ("https://video.example", ("video.example:443",), True),  # a proxy with the port
        ("https://video.example", ("video.example",), True),
        ("https://VIDEO.example", ("Video.Example",), True),
        ("http://video.example", ("video.example:80",), True),
        ("http://video.example", ("video.example:443",), False),
        ("https://video.example", ("127.0.0.1:8000", "video.example"), True),  # X-Forwarded-Host
        ("https://video.example:8443", ("video.example",), False),
        ("https://video.example", ("video.example.evil.example",), False),
        ("null", ("null",), False),
        ("https://", ("",), False),
        ("http://[::1]:8000", ("[::1]:8000",), True),
    ],
)
def test_the_own_page_by_any_spelling(origin, hosts, allowed):
    assert origins.origin_allowed(origin, hosts, ()) == allowed


@pytest.mark.parametrize(
    "host, bound, named, allowed",
    [
        *((host, "127.0.0.1", (), True) for host in ("localhost:8000", "LocalHost", "127.0.0.1", "[::1]:8000", None)),
        *(
            (host, "127.0.0.1", (), False)
            for host in ("evil.example", "192.168.1.5", "localhost.evil.example", "", "[")
        ),
        ("127.0.0.1.evil.example", "127.0.0.1", (), False),
        ("192.168.1.5:8000", "192.168.1.5", (), True),
        ("192.168.1.5:8000", "0.0.0.0", (), True),  # every address is bound
        ("[fe80::1]:8000", "::", (), True),
        ("evil.example", "0.0.0.0", (), False),
        ("1.2.3.4.evil.example", "0.0.0.0", (), False),
        ("box:8000", "box", (), True),
        ("video.example:443", "127.0.0.1", ("https://video.example",), True),
        ("other.example", "127.0.0.1", ("https://video.example",), False),
        ("evil.example", "127.0.0.1", ("*",), True),
    ],
)
def test_the_names_of_a_server_without_a_token(host, bound, named, allowed):
    assert origins.host_allowed(host, bound, origins.listed(named)) == allowed


@pytest.mark.parametrize("bound", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_what_is_of_this_machine_only(bound):
    assert origins.is_local(bound) and not origins.is_local("0.0.0.0") and not origins.is_local("box")
