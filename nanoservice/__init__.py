"""The chassis: the code that all nanoservices of this repository share.

A service provides its routes, its resources and its own settings (`service.Service`). The chassis provides configuration,
logs, metrics, probes, error answers, the connection to Redis, an orderly start and a graceful shutdown.
"""

# The version of this repository and of each of its images. A release's tag is this version with the letter v.
__version__ = "0.1.0"
