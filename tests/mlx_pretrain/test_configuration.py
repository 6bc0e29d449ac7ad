"""The command line: what is wrong is said in one line that names the place."""

import subprocess
import sys

import gin
import pytest

from mlx_pretrain import configuration
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import DecoderConfig


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def test_overrides_may_be_strings_without_quotes():
    flags = configuration.parse_flags(["--gin_file=a.gin", "--gin.A.b=3", "--gin.A.c=runs/x", "--gin.M='y'"])
    assert (flags.files, flags.bindings) == (["a.gin"], ["A.b = 3", "A.c = 'runs/x'", "M = 'y'"])


def test_references_to_what_a_file_imports_later_stay_references():
    flags = ["--gin.A.raters=[@Later(), @Other]", "--gin.A.path=%LATER", "--gin.A.text=[@oops"]
    assert configuration.parse_flags(flags).bindings == ["A.raters = [@Later(), @Other]", "A.path = %LATER",
                                                   "A.text = '[@oops'"]


def test_files_and_overrides_reach_the_constructor(tmp_path):
    file = tmp_path / "a.gin"
    file.write_text("include 'gin/models/base_1p2b.gin'\nDecoderConfig.n_layers = 2\n")
    configuration.parse_gin([str(file)], ["DecoderConfig.vocab_size = 1000"])
    config = DecoderConfig()
    assert (config.n_layers, config.vocab_size, config.mlp_dim) == (2, 1000, 5504)


@pytest.mark.parametrize(
    "text, message",
    [
        ("DecoderConfg.n_layers = 2", r"a\.gin:1: .*DecoderConfg"),
        ("\nDecoderConfig.n_layer = 2", r"a\.gin:?.*n_layer"),
        ("DecoderConfig.n_layers 2", r"a\.gin"),
        ("include 'nowhere.gin'", r"nowhere\.gin"),
        ("import no_such_module", r"no_such_module"),
    ],
)
def test_gin_typos_name_file_and_cause(tmp_path, text, message):
    file = tmp_path / "a.gin"
    file.write_text(text + "\n")
    with pytest.raises(InputError, match=message) as error:
        configuration.parse_gin([str(file)], [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argument", ["steps=3", "--steps=3", "--gin_file", "--shard=0/2", "--processes=2"])
def test_unknown_flags_are_refused(argument):
    with pytest.raises(InputError, match=argument):
        configuration.parse_flags([argument])


def test_commands_end_with_one_line_and_a_code():
    done = subprocess.run(
        [sys.executable, "-m", "mlx_pretrain.train", "--gin_file=missing.gin"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "error: missing.gin: no such gin file\n")
    done = subprocess.run([sys.executable, "-m", "mlx_pretrain.train"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "run_dir" in done.stderr
    done = subprocess.run([sys.executable, "-m", "mlx_pretrain.train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--gin_file" in done.stdout
