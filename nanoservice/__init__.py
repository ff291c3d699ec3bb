"""The chassis: what every nanoservice of this repository shares.

A service brings its routes, its resources and its own settings (`service.Service`); the chassis brings configuration,
logs, metrics, probes, error answers, the Redis connection, correct start and stop.
"""
