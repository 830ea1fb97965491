"""Everything static stands in pyproject.toml; the CUDA extension will be built from here."""

from setuptools import setup

setup()
