"""Hosts and origins: the names that a server answers to, and the pages that may use it.

An origin is scheme, host and port (RFC 6454), compared in lower case and without a scheme's default port.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

PORTS = {"http": 80, "https": 443}
LOCAL = ("localhost", "127.0.0.1", "::1")
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?\.?")  # of a host; others are addresses in brackets


def split_host(text: str) -> tuple[str, int | None] | None:
    """host[:port] as a Host header has it -> (host in lower case without brackets, port); None if it is none."""
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^\[\]:]+)(?::([0-9]{1,5}))?", text.strip().lower())
    if match is None or (port := int(match[2] or 0)) > 65535:
        return None
    host = match[1]
    if host.startswith("["):
        host = host[1:-1]
        if not is_address(host):
            return None
    elif NAME.fullmatch(host) is None:
        return None
    return host.rstrip("."), port if match[2] else None


def normalized(origin: str) -> str:
    """scheme://host[:port] in the form that a browser sends; ValueError if the text is no origin of a web page."""
    scheme, separator, rest = origin.strip().lower().partition("://")
    host = split_host(rest)
    if scheme not in PORTS or not separator or host is None:
        raise ValueError(f"{origin!r} is not scheme://host[:port]")
    name = f"[{host[0]}]" if ":" in host[0] else host[0]
    return f"{scheme}://{name}" + ("" if host[1] in (None, PORTS[scheme]) else f":{host[1]}")


def listed(origins: tuple[str, ...]) -> tuple[str, ...]:
    """What was given as `--origin`, as browsers send it: a host alone stands for http and https, a slash at the end is
    dropped, "*" stays. Raises ValueError, with the nearest that is possible, for a path and for what is no origin."""
    found: list[str] = []
    for given in origins:
        text = given.strip().removesuffix("/")
        try:
            schemes = ("",) if "://" in text else ("http://", "https://")
            found += ["*"] if text == "*" else [normalized(scheme + text) for scheme in schemes]
        except ValueError:
            raise ValueError(f"origin={given!r}: must be scheme://host[:port] of a page{_nearest(text)}") from None
    return tuple(found)


def _nearest(text: str) -> str:
    try:
        parts = urlsplit(text if "://" in text else f"https://{text}")
        scheme = parts.scheme if parts.scheme in PORTS else "https"
        return f"; nearest is {normalized(f'{scheme}://{parts.netloc}')}"
    except ValueError:
        return ", e.g. https://video.example"


def origin_allowed(origin: str | None, hosts: tuple[str, ...], origins: tuple[str, ...]) -> bool:
    """A request without an Origin is not from a browser's page; others must be from the server's own pages or listed.

    Args:
        origin: the Origin header.
        hosts: under which the server was asked: Host, X-Forwarded-Host. A page cannot set either for a server of
            another origin.
        origins: from `listed`.
    """
    if origin is None or "*" in origins:
        return True
    try:
        origin = normalized(origin)
    except ValueError:  # "null": a page without a host
        return False
    return origin in origins or any(_same(origin, host) for host in hosts)


def _same(origin: str, host: str) -> bool:
    try:
        return origin == normalized(f"{origin.partition('://')[0]}://{host}")
    except ValueError:
        return False


def host_allowed(host: str | None, bound: str, origins: tuple[str, ...]) -> bool:
    """A server without a token answers to names that are its own only: else a page of a foreign name that resolves to
    this machine (DNS rebinding) is the server's own page to the browser.

    Args:
        host: the Host header; browsers always send one.
        bound: the address that the server listens at. Where that is every address of the machine, all addresses in
            digits are its own: nobody can rebind those.
        origins: from `listed`; their hosts are the server's own too.
    """
    if host is None or "*" in origins:
        return True
    parts = split_host(host)
    if parts is None:
        return False
    name = parts[0]
    hosts = {split_host(origin.partition("://")[2]) for origin in origins}
    own = {*LOCAL, bound.lower().strip("[]"), *(found[0] for found in hosts if found is not None)}
    return name in own or (is_any(bound) and is_address(name))


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_any(bound: str) -> bool:
    """Every address of the machine."""
    return bound in ("", "*") or (is_address(bound) and ipaddress.ip_address(bound).is_unspecified)


def is_local(bound: str) -> bool:
    """Of this machine only."""
    return bound.lower() == "localhost" or (is_address(bound) and ipaddress.ip_address(bound).is_loopback)
