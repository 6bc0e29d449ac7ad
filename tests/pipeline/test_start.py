"""The pipeline says something soon after its start."""

import subprocess
import sys


def test_no_plotting_library_is_loaded_before_the_first_line():
    """It takes as long to load as all the rest."""
    code = "import sys, pipeline.__main__; print('matplotlib' in sys.modules, 'jax' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False True\n"  # settings hold a model, which needs jax
