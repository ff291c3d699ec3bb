"""Hide uvloop from a process that must run on asyncio's own event loop: its PYTHONPATH names this folder first."""

raise ImportError("uvloop is hidden")
