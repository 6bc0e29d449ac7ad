"""Command lines: flags, shards and processes, and errors in one line that names the place."""

import os
import subprocess
import sys

import pytest

import mlx_pretrain.train  # noqa: F401  its configurables
from mlx_pretrain import command_line
from mlx_pretrain.configuration import gin_files
from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import cluster


def test_overrides_may_be_strings_without_quotes():
    flags = command_line.parse_flags(["--gin_file=a.gin", "--gin.A.b=3", "--gin.A.c=runs/x", "--gin.M='y'"])
    assert (flags.files, flags.bindings) == (["a.gin"], ["A.b = 3", "A.c = 'runs/x'", "M = 'y'"])


def test_references_to_what_a_file_imports_later_stay_references():
    flags = ["--gin.A.raters=[@Later(), @Other]", "--gin.A.path=%LATER", "--gin.A.text=[@oops"]
    assert command_line.parse_flags(flags).bindings == ["A.raters = [@Later(), @Other]", "A.path = %LATER",
                                                   "A.text = '[@oops'"]


@pytest.mark.parametrize("argument", ["steps=3", "--steps=3", "--gin_file", "--shard=0/2", "--processes=2"])
def test_unknown_flags_are_refused(argument):
    with pytest.raises(InputError, match=argument):
        command_line.parse_flags([argument])


def test_with_beam_other_flags_are_those_of_beam():
    flags = command_line.parse_flags(
        ["--gin_file=a.gin", "--beam", "--runner=DirectRunner", "--streaming", "-x", "1", "--gin.a.b=2"],
        has_phases=True)
    assert flags.beam == ["--runner=DirectRunner", "--streaming", "-x", "1"]
    assert (flags.files, flags.bindings) == (["a.gin"], ["a.b = 2"])
    assert command_line.parse_flags(["--shard=1/2", "--wait=9.5"], has_phases=True).wait == 9.5
    for arguments, has_phases in ((["--runner=DirectRunner"], True), (["--beam"], False)):
        with pytest.raises(InputError):
            command_line.parse_flags(arguments, has_phases=has_phases)


PLACE = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


def test_a_command_for_one_process_runs_in_process_0_alone(tmp_path):
    """Other processes write nothing, and process 0 does not wait for them."""
    (tmp_path / "en.jsonl").write_text('{"text": "The quick brown fox"}\n{"text": "jumps over the lazy dog."}\n')
    command = [sys.executable, "-m", "data_mixtures.hold_out", "--gin.Corpus.files=en.jsonl",
               "--gin.hold_out.corpus=@Corpus()", "--gin.hold_out.output=out"]
    environment = os.environ | PLACE | {"PYTHONPATH": gin_files.GIN_ROOT}
    other = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (other.returncode, other.stdout) == (0, "") and not (tmp_path / "out").exists()
    assert other.stderr == "process 2 of 3: this command runs in one process, which is process 0\n"
    main = subprocess.run(command, cwd=tmp_path, env=environment | {"JAX_PROCESS_ID": "0"}, capture_output=True)
    assert main.returncode == 0 and (tmp_path / "out/held_out.json").exists()


def test_processes_that_a_launcher_started_are_shards(monkeypatch):
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    try:
        with command_line._hosts(command_line.Flags(), joins=False, shards=True):
            assert cluster.shard() == (2, 3) and cluster.size() == 1
    finally:
        cluster.take_shard(None)


def test_commands_end_with_one_line_and_a_code():
    done = subprocess.run(
        [sys.executable, "-m", "mlx_pretrain.train", "--gin_file=missing.gin"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "error: missing.gin: no such gin file\n")
    done = subprocess.run([sys.executable, "-m", "mlx_pretrain.train"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "run_dir" in done.stderr
    done = subprocess.run([sys.executable, "-m", "mlx_pretrain.train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--gin_file" in done.stdout
