"""The arrows between packages point down, and the core runs without TensorFlow."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SIBLINGS = {"data_mixtures", "raters", "evals", "video"}
HEAVY = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "torch"}


def imported(path: pathlib.Path) -> set[str]:
    """Top-level names of everything a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ["mlx_pretrain", *sorted(SIBLINGS)])
def test_arrows_point_down(package):
    forbidden = (SIBLINGS | HEAVY if package == "mlx_pretrain" else SIBLINGS - {package}) | {"tests", "pipeline"}
    for path in (ROOT / package).rglob("*.py"):
        assert not imported(path) & forbidden, path


def test_core_never_loads_tensorflow():
    """Not through a dependency either: training, generation and everything else in the core."""
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "mlx_pretrain").rglob("*.py")]
    code = f"import sys, {', '.join(modules)}; print(sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_commands_over_documents_never_load_jax():
    """A process that does tasks for them starts in moments, and many fit on a machine."""
    modules = [f"raters.{name}" for name in ("languages", "duplicates", "decontaminate", "select", "apply_heads")]
    code = f"import sys, {', '.join(modules)}; print(sorted(set(sys.modules) & {HEAVY | {'jax', 'scipy', 'grain'}!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
