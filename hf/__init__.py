"""Hugging Face folders, read and written (a package for the reason that cli/__init__.py gives)."""
