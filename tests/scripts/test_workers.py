"""Commands on workers are kept running: on a list of hosts (here this machine), under SLURM's script, on TPU VMs."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import launch
import pytest

from tests.e2e.conftest import TINY, environment, last_step, saved_steps
from tests.e2e.hosts import free_port

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 120  # generous, for busy machines


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(child) for child in listed.stdout.split()]


class Launch:
    """The launcher `hosts` with two processes on this machine, in a folder of its own."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.log = folder, folder / "runs" / "launch" / "two"
        self.flags = ["--name=two", "--hosts=a,b", "--ssh=local", f"--folder={folder}", "--install=", "--poll=.3",
                      f"--coordinator=localhost:{free_port()}"]
        self.environment = os.environ | environment() | {
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}", "LAUNCH_PAUSE": ".1"}

    def arguments(self, action: str, *command: str) -> list[str]:
        return [sys.executable, str(ROOT / "scripts" / "launch.py"), "hosts", action, *self.flags, *command]

    def start(self, *command: str) -> subprocess.Popen:
        return subprocess.Popen(self.arguments("run", "--", *command), env=self.environment, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)

    def call(self, action: str, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(self.arguments(action, *command), env=self.environment, capture_output=True, text=True,
                              timeout=SECONDS)

    def pid(self, process: int) -> int:
        """Returns the process id of a worker's loop."""
        return int((self.log / f"worker-{process}.pid").read_text())

    def output(self, process: int) -> str:
        return (self.log / f"worker-{process}.log").read_text()


@pytest.fixture
def two(tmp_path) -> Iterator[Launch]:
    job = Launch(tmp_path / "it's here")
    yield job
    for process in (0, 1):
        with contextlib.suppress(OSError, ValueError):
            os.killpg(job.pid(process), signal.SIGKILL)


def test_a_failing_command_is_started_again_and_a_finished_one_is_not(two):
    """Each process fails twice. Its arguments arrive as they are."""
    script = ('echo "$1" >> tries-$JAX_PROCESS_ID; n=$(wc -l < tries-$JAX_PROCESS_ID); '
              'echo "try $n of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"; [ $n -ge 3 ]')
    with two.start("bash", "-c", script, "bash", "a 'b' $c") as process:
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert "two: 2 finished" in err
    for number in (0, 1):
        assert (two.folder / f"tries-{number}").read_text() == "a 'b' $c\n" * 3
        assert re.search(r"try 3 of 2 at localhost:\d+\nlaunch: \S+ ended with exit code 0", two.output(number))
    assert two.call("status").stdout == "== a\nlaunch-state: finished\n== b\nlaunch-state: finished\n"
    logs = two.call("logs", "--lines=1").stdout
    assert re.fullmatch(r"== a\n.*exit code 0 after \d+ s\n== b\n.*exit code 0 after \d+ s\n", logs)


def test_the_code_follows_changes(two, monkeypatch):
    assert two.call("run", "--", "true").returncode == 0
    assert (two.folder / "setup.py").read_bytes() == (ROOT / "setup.py").read_bytes()
    assert not (two.folder / ".git").exists() and not (two.folder / ".venv").exists()
    stale, own = two.folder / "mlx_pretrain" / "stale.py", two.folder / "runs" / "mine" / "metrics.jsonl"
    own.parent.mkdir()
    for file in (stale, own):
        file.touch()
    with (two.folder / ".launch_files").open("a") as listing:
        listing.write("mlx_pretrain/stale.py\n")  # as if an earlier archive had it
    assert two.call("run", "--", "true").returncode == 0
    assert not stale.exists() and own.exists()


def test_a_command_that_only_fails_is_given_up(two):
    with two.start("bash", "-c", "echo no such file >&2; exit 3") as process:
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert re.search(r"^error: two: failed with exit code 3; its output: .*worker-\*\.log on the hosts$", err,
                     re.MULTILINE), err
    assert two.output(0).count("no such file") == 5 and "gives up: 5 attempts" in two.output(0)


def test_a_loop_that_is_killed_is_started_again_and_stop_stops(two):
    """kill -9 of a whole process group is what a reboot does."""
    with two.start("sleep", "1000") as process:
        wait_for(lambda: all((two.log / f"worker-{n}.pid").exists() and children(two.pid(n)) for n in (0, 1)), process)
        first = [two.pid(0), two.pid(1)]
        os.killpg(first[1], signal.SIGKILL)
        wait_for(lambda: two.pid(1) != first[1] and children(two.pid(1)), process)
        assert two.pid(0) == first[0]  # it went on
        # A second launcher finds both running, and starts nothing.
        with two.start("sleep", "1000") as second:
            wait_for(lambda: "runs already" in second.stderr.readline(), second)
            second.terminate()
        assert [two.pid(0)] == first[:1]
        assert two.call("stop").returncode == 0
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1 and "error: two: stopped" in err
    assert two.call("status").stdout == "== a\nlaunch-state: stopped\n== b\nlaunch-state: stopped\n"


@pytest.mark.slow
def test_training_on_two_processes_resumes_after_a_kill(two, store_dir):
    steps = 40
    lines = TINY.format(store=store_dir, steps=steps, compiled=os.environ["JAX_COMPILATION_CACHE_DIR"]).splitlines()
    settings = [f"--gin.{name.strip()}={value.strip().strip(chr(39))}" for name, _, value in
                (line.partition("=") for line in lines if line)]
    run_dir = two.folder / "run"
    with two.start("python", "-m", "mlx_pretrain.train", *settings, "--gin.train.checkpoint_every=4") as process:
        wait_for(lambda: len(saved_steps(run_dir)) >= 2, process)
        os.kill(children(two.pid(1))[0], signal.SIGKILL)
        killed = time.time()
        _, err = process.communicate(timeout=2 * SECONDS)
    assert process.returncode == 0, (err, two.output(0), two.output(1))
    assert last_step(run_dir, killed) == steps
    assert "is gone; process 0 ends too" in two.output(0) and "resumed after step" in two.output(0)
    assert "ended with exit code 137" in two.output(1)
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["processes"] == 2


# SLURM

SRUN = """#!/bin/bash
# Stands for srun: runs the command as one task, and forwards SIGTERM, as srun does.
while [[ $1 == --* ]]; do shift; done
export SLURM_PROCID=0
trap 'kill -TERM $!' TERM
"$@" &
while true; do wait $!; code=$?; [[ -n $(jobs -pr) ]] || exit $code; done
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*"
"""


@contextlib.contextmanager
def batch_job(folder: pathlib.Path, *command: str, **variables: str) -> Iterator[subprocess.Popen]:
    """Runs the batch script as SLURM would, with its commands replaced: there is no SLURM here."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "LAUNCH_PAUSE": ".1",
                                "SLURM_JOB_ID": "71", "SLURM_JOB_NAME": "one"} | variables
    with subprocess.Popen(["bash", str(ROOT / "scripts/launchers/slurm_job.sh"), *command], cwd=folder, text=True,
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        yield process
        process.kill()


SAVES = ("bash", "-c", "trap 'echo saved; exit 143' TERM; echo up; sleep 60 >/dev/null 2>&1 & wait")


@pytest.mark.parametrize("signals, variables, stopped, outcome", [
    ("script:USR1", {}, False, "scontrol requeue Incomplete 71"),       # the time limit is near
    ("step", {}, False, "scontrol requeue Incomplete 71"),              # preemption: SIGTERM for the tasks
    ("step", {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}, False, "scontrol requeue Incomplete 70_3"),
    ("step", {}, True, "stopped; it is not queued again"),              # launch.py slurm stop
])
def test_slurm_jobs_save_and_are_queued_again_unless_stopped(tmp_path, signals, variables, stopped, outcome):
    with batch_job(tmp_path, *SAVES, **variables) as process:
        assert "starts on" in process.stdout.readline() and process.stdout.readline() == "up\n"
        if stopped:
            (tmp_path / "runs/launch/one").mkdir(parents=True)
            (tmp_path / "runs/launch/one/stopped").touch()
        if signals == "step":
            os.kill(children(process.pid)[0], signal.SIGTERM)
        else:
            process.send_signal(signal.SIGUSR1)
        out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 143
    assert "saved\n" in out and "ended with exit code 143" in out and out.rstrip().endswith(outcome), out


def test_slurm_jobs_repeat_failures_in_their_allocation(tmp_path):
    script = 'echo x >> "tries $1"; [ $(wc -l < "tries $1") -ge 3 ]'
    with batch_job(tmp_path, "bash", "-c", script, "bash", "a'$b") as process:
        out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and out.count("ended with exit code 1") == 2
    assert (tmp_path / "tries a'$b").read_text() == "x\n" * 3
    with batch_job(tmp_path, "false", LAUNCH_MAX_FAILURES="2") as process:
        out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1 and "gives up: 2 attempts" in out and "scontrol" not in out


# TPU VMs

class Cloud:
    """A cloud of one queued resource: a program `gcloud` that checks its arguments, and runs ssh and scp here.

    `events` are states that `list` reports in this order, the last one for ever; "" is no queued resource.
    """

    def __init__(self, folder: pathlib.Path, monkeypatch):
        self.folder = folder
        (folder / "bin").mkdir()
        program = folder / "bin" / "gcloud"
        program.write_text(f"#!{sys.executable}\nimport sys; sys.path.insert(0, {str(ROOT)!r})\n"
                           "from tests.scripts.cloud import main; main()\n")
        program.chmod(0o755)
        (folder / "home").mkdir()
        (folder / "workers").write_text("1")
        monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
        monkeypatch.setenv("CLOUD", str(folder))
        monkeypatch.setenv("LAUNCH_PAUSE", ".1")

    def calls(self) -> list[str]:
        """Returns the subcommands that were called, in order."""
        return (self.folder / "calls").read_text().split()

    def run(self, states: list[str], *command: str, flags: tuple[str, ...] = ()) -> str:
        """Runs the launcher in this process; returns the message it ended with, "" for success."""
        (self.folder / "states").write_text("\n".join(states))
        options = launch.parse([
            "tpu_vm", "--name=one", "--project=p", "--zone=us-east5-b", "--accelerator_type=v5litepod-16",
            "--runtime_version=v2-alpha-tpuv5-lite", "--install=", "--poll=.05", *flags, "--", *command])
        try:
            launch.tpu_vm.run(options, launch.base.Shell(dry_run=False))
        except launch.base.LaunchError as error:
            return str(error)
        return ""


@pytest.fixture
def cloud(tmp_path, monkeypatch) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path, monkeypatch)
    yield cloud
    for path in tmp_path.rglob("worker*.pid"):
        with contextlib.suppress(OSError):
            os.killpg(int(path.read_text()), signal.SIGKILL)


def test_a_tpu_is_created_runs_and_is_deleted(cloud):
    command = ("bash", "-c", 'echo "$1" > ran', "bash", "a 'b' $c")
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert cloud.run(states, *command, flags=("--delete_when_done",)) == ""
    calls = cloud.calls()
    assert calls[:8] == ["list", "create", "list", "list", "list", "scp", "ssh", "ssh"] and calls[-1] == "delete"
    assert (cloud.folder / "home/mlx-pretrain/ran").read_text() == "a 'b' $c\n"
    assert (cloud.folder / "home/mlx-pretrain/setup.py").exists()


def test_a_slice_that_gcloud_silently_leaves_out_is_noticed(cloud, capfd):
    """gcloud warns of a slice that it cannot reach, and succeeds."""
    (cloud.folder / "workers").write_text("1\n1")
    message = cloud.run(["", "ACTIVE"], "true", flags=("--slices=2",))
    assert message == "one: the code could not be sent to all workers"
    assert capfd.readouterr().err.count("one: 1 of 2 workers answered") == 5
    assert not list(cloud.folder.rglob("worker.pid"))


def test_a_preempted_tpu_is_created_again(cloud):
    """The command waits for ever on the first machines, and ends on the second, which begin without its files."""
    command = ("bash", "-c", "[ -e ../second ] || sleep 1000")
    states = ["", "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "SUSPENDED", "", "PROVISIONING", "ACTIVE"]
    assert cloud.run(states, *command) == ""
    calls = cloud.calls()
    assert calls.count("create") == 2 and calls.count("delete") == 1
    assert calls.index("delete") < len(calls) - calls[::-1].index("create")
    assert calls.count("scp") == 2


def test_a_queued_resource_that_fails_three_times_ends_with_its_reason(cloud, capfd):
    message = cloud.run(["", "FAILED", "FAILED"] + ["", "FAILED", "FAILED"] * 3, "true")
    assert re.fullmatch(r"one: the queued resource failed three times in a row; the reason is above; delete it: "
                        r"gcloud .*", message)
    assert cloud.calls().count("create") == 3 and "no more capacity" in capfd.readouterr().out


def test_a_command_that_fails_on_a_tpu_ends_with_its_code(cloud, monkeypatch, capfd):
    monkeypatch.setenv("LAUNCH_MAX_FAILURES", "1")
    assert cloud.run(["", "ACTIVE"], "false") == (
        "one: failed with exit code 1; its output: the action `logs` of this launcher")
    assert "the TPUs still cost money; delete them: gcloud compute tpus queued-resources delete one" in (
        capfd.readouterr().err)
