"""Hide uvloop from a process that must run on asyncio's own event loop. Such a process has this folder first on its path."""

raise ImportError("uvloop is hidden")
