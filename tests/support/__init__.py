"""Tools that several tests share. The tools that the chassis's tests use import no service."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
