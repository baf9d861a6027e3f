"""Configuration lives in pyproject.toml; this file is where the compiled library of `csrc/` is built."""

from setuptools import setup

setup()
