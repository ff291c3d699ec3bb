"""Tools that several tests share. A tool that a test of the chassis uses must not import a service."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
