"""Command lines: all that knows `--options`, besides the scripts themselves.

This file makes the folder a package, so that an installed package of the same name cannot take its place.
"""
