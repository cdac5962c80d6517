"""Tasks of evaluation, their reports and plans (a package for the reason that cli/__init__.py gives)."""
