"""Files, checkpoints and logs (a package for the reason that cli/__init__.py gives)."""
