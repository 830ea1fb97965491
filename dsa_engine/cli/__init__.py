"""The command `dsa-engine`: generate | serve | info | convert | train | doctor, a module each."""

from dsa_engine.cli.entry import main

__all__ = ["main"]
