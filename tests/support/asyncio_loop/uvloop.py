"""Hide uvloop from a process that must run on asyncio's own event loop. Such a process has this folder first in PYTHONPATH."""

raise ImportError("uvloop is hidden")
