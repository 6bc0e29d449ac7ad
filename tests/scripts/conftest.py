"""The launcher is a script: its folder is on the path when it runs, and here."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "scripts"))
