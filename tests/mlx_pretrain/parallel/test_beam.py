"""Apache Beam does the tasks on its DirectRunner: the output is that of one process, byte for byte."""

import json
import pathlib
import subprocess
import sys

import pytest

from mlx_pretrain.configuration.gin_files import GIN_ROOT
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import phases
from tests.mlx_pretrain.parallel import counting
from tests.mlx_pretrain.parallel.counting import CountConfig, main
from tests.mlx_pretrain.parallel.test_phases import alone, config, contents  # noqa: F401  fixtures

pytest.importorskip("apache_beam")
pytestmark = pytest.mark.filterwarnings("default")  # Beam's own


@pytest.fixture
def beam():
    phases.use(beam=["--runner=DirectRunner"])
    yield
    phases.use()


def test_a_pipeline_makes_the_same(config, alone, beam):  # noqa: F811
    assert main(config)
    assert contents(config.output) == alone


def test_it_does_what_is_left_after_a_failure(config, alone, beam):  # noqa: F811
    with pytest.raises(InputError, match=r"^b fails$"):
        main(CountConfig(config.folder, config.output, fails="b"))
    done = pathlib.Path(config.output).parent / ".out.parts/done"
    assert len(list((done / "count").iterdir())) == 5 and not (done / "add").exists()
    counting.done.clear()
    assert main(config) and set(counting.done) <= {"a", "b", "c", "all"} and "b" in counting.done
    assert contents(config.output) == alone


def test_a_command_takes_the_runner_s_flags(tmp_path):
    for name in ("en", "de", "fr"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "The quick brown fox jumps over the dog."}) + "\n")
    command = [sys.executable, "-m", "raters.languages", "--gin_file=gin/raters/languages.gin",
               "--gin.DOCUMENTS=*.jsonl"]
    for output, *flags in (("alone",), ("beam", "--beam", "--runner=DirectRunner", "--direct_num_workers=1")):
        done = subprocess.run([*command, f"--gin.MISLABELLED={output}", *flags], cwd=tmp_path, text=True,
                              capture_output=True, env={"PYTHONPATH": GIN_ROOT, "PATH": "/usr/bin:/bin"})
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "beam") == contents(tmp_path / "alone")
    (tmp_path / "en.jsonl").write_text(json.dumps({"text": "x", "lang": "xyz"}) + "\n")
    done = subprocess.run([*command, "--gin.MISLABELLED=other", "--beam"], cwd=tmp_path, text=True,
                          capture_output=True, env={"PYTHONPATH": GIN_ROOT, "PATH": "/usr/bin:/bin"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: en.jsonl:1: 'xyz' is no code of a language, such as")
