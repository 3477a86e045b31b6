"""Builds the distribution; everything that pyproject.toml can say stands there."""

from setuptools import setup

setup()
