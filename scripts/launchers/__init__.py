"""Launchers of `scripts/launch.py`: one module for each kind of machine. They need Python 3.9 and no package."""
