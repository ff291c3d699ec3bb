"""Tools that several tests share. Nothing that the chassis's tests use here imports a service."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
