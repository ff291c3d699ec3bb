"""Stands before uvloop on the path of a process that is to run on asyncio's own event loop."""

raise ImportError("uvloop is hidden")
