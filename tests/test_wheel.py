"""A built wheel, installed where the repository is not, has all that its commands need."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("mlx_pretrain", "data_mixtures", "raters", "evals", "video", "pipeline")


def call(*command, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """A wheel built as `pip wheel` builds it, from a copy: setuptools leaves folders beside setup.py."""
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "gin", "requirements"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    call(sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "--no-index",
         f"--wheel-dir={source}/wheels")
    (built,) = (source / "wheels").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """The Python of an environment with the wheel; the libraries are those of the tests' environment."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, and its own .pth files (an editable install of the repository) are not read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_it_holds_every_module_gin_file_and_template(wheel):
    expected = {f"mlx_pretrain/{path.relative_to(ROOT)}" for path in (ROOT / "gin").rglob("*.gin")}
    expected |= {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*")
                 if path.is_file() and path.suffix not in (".pyc", ".so")}
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == expected


def test_its_commands_find_gin_files_and_templates_from_another_folder(installed, store_dir, tmp_path):
    """gin/runs/demo.gin includes others; the report needs templates."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = call(installed, "-c", "import mlx_pretrain; print(mlx_pretrain.__file__)", cwd=tmp_path, env=environment)
    assert pathlib.Path(where.strip()).is_relative_to(installed.parents[1])
    (tmp_path / "own.gin").write_text("include 'gin/models/nano.gin'\nDecoderConfig.n_layers = 1\n")
    call(installed, "-m", "mlx_pretrain.train", "--gin_file=gin/runs/demo.gin", "--gin_file=own.gin",
         "--gin.DecoderConfig.vocab_size=96", "--gin.DecoderConfig.unroll=1", "--gin.train.optimizer=@adamw",
         f"--gin.TOKEN_STORE={store_dir}", f"--gin.RATES={store_dir}/rates.json", "--gin.RUN_DIR=run", "--gin.STEPS=1",
         "--gin.warmup_cosine.warmup_steps=0", "--gin.train.eval_every=None", cwd=tmp_path, env=environment)
    call(installed, "-m", "mlx_pretrain.report", "--gin.report.run_dir=run", cwd=tmp_path, env=environment)
    assert "</html>" in (tmp_path / "run" / "report.html").read_text()
