"""The plans of scripts/launch.py: only flags that the tools have, arguments that arrive unchanged, clear refusals."""

import contextlib
import io
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import launch
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from launchers import base, gke, hosts

from mlx_pretrain.command_line import parse_flags
from tests.scripts.grammars import GRAMMARS, check, check_schema

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = ["--", "python", "-m", "mlx_pretrain.train", "--gin_file=gin/runs/pretrain_1p2b.gin", "--gin.RUN_DIR=gs://b/run"]
ENV = "--env=LIBTPU_INIT_ARGS=--xla_a=1 --xla_b=2"
PLACE = ["--project=p", "--zone=us-east5-b"]
TPU = ["tpu_vm", "--name=one", *PLACE]
TPU_RUN = [*TPU, "--accelerator_type=v5litepod-16", "--runtime_version=v2-alpha-tpuv5-lite"]
JOBSET = ["jobset", "--name=one", "--context=c"]
JOBSET_RUN = [*JOBSET, "--image=r.dev/p/i:t", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4"]
XPK = ["xpk", "--name=one", "--cluster=c", *PLACE]
XPK_RUN = [*XPK, "--image=r.dev/p/i:t", "--tpu_type=v5litepod-16"]
SLURM = ["slurm", "--name=one"]
HOSTS = ["hosts", "--name=one", "--hosts=a,me@b"]

RUNS = {
    "tpu_vm": [*TPU_RUN, "--spot", ENV, *TRAIN],
    "tpu_vm_all_flags": [*TPU_RUN, "--slices=2", "--reserved", "--service_account=a@p.iam.gserviceaccount.com", "--iap",
                         "--network=n", "--subnetwork=s", "--delete_when_done", *TRAIN, "--gin.SLICES=2"],
    "jobset": [*JOBSET_RUN, ENV, *TRAIN],
    "jobset_all_flags": [*JOBSET_RUN, "--slices=2", "--spot", "--service_account=a", "--no_build", *TRAIN],
    "xpk": [*XPK_RUN, "--slices=2", ENV, *TRAIN],
    "slurm": [*SLURM, "--nodes=2", "--gpus_per_node=8", "--tasks_per_node=8", "--cpus_per_task=8", "--time=1-0",
              "--partition=p", "--account=a", "--sbatch=--constraint=h100", ENV, *TRAIN],
    "slurm_shards": [*SLURM, "--shards=16", "--shards_at_once=4", "--", "python", "-m", "raters.score"],
    "hosts": [*HOSTS, ENV, *TRAIN],
}
ACTIONS = {
    f"{flags[0]}_{action}": [flags[0], action, *flags[1:]]
    for flags in (TPU, JOBSET, XPK, SLURM, HOSTS) for action in ("status", "logs", "stop", "delete")
    if hasattr(launch.TARGETS[flags[0]][0], action)
}


class Recorder(base.Shell):
    """A dry run that keeps the commands it prints."""

    def __init__(self):
        super().__init__(dry_run=True)
        self.commands = []

    def _print(self, argv, redirection=""):
        self.commands.append(list(argv))
        super()._print(argv, redirection)


def plan(arguments: list[str]) -> tuple[list[list[str]], str]:
    """Returns the commands of a plan, and its text."""
    options, shell, text = launch.parse(arguments), Recorder(), io.StringIO()
    with contextlib.redirect_stdout(text):
        getattr(launch.TARGETS[options.target][0], options.action)(options, shell)
    return shell.commands, text.getvalue()


def jobset_manifest() -> dict:
    """Returns a manifest with all fields that the launcher ever writes."""
    return gke.JobSet.manifest(launch.parse(RUNS["jobset_all_flags"]), ["python"])


def launched(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
    """Runs scripts/launch.py."""
    return subprocess.run([sys.executable, "scripts/launch.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=None if path is None else {"PATH": path})


@pytest.mark.parametrize("name", RUNS | ACTIONS)
def test_every_command_fits_the_grammar_of_its_tool(name):
    commands, text = plan((RUNS | ACTIONS)[name])
    assert commands
    for argv in commands:
        check(argv)
    # The plan itself is a shell script, in which each command reads as it is run.
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    joined = text.replace(" \\\n   ", "")
    for argv in commands:
        assert any(shlex.split(line.split(" < ")[0]) == argv for line in joined.splitlines()
                   if line.startswith(argv[0])), argv


def test_the_check_refuses_what_the_tools_refuse():
    create = ["gcloud", "compute", "tpus", "queued-resources", "create", "one", "--runtime-version=v"]
    check(create)
    for wrong, message in (
        ([*create, "--sopt"], "unknown flag --sopt"), ([*create, "--spot=yes"], "takes no value"),
        (create[:-1], "lacks"), ([*create, "--node-id"], "needs a value"),
        (["gcloud", "compute", "tpus", "start", "one"], "no such command"),
        (["sbatch", "--node=2", "job.sh"], "unknown flag --node"),
        (["xpk", "workload", "list", "--cluster=c", "--filter-by-status=DONE"], "is not one of"),
    ):
        with pytest.raises(AssertionError, match=message):
            check(wrong)


def test_the_scripts_call_srun_and_scontrol_as_they_are():
    text = (ROOT / "scripts/launchers/slurm_job.sh").read_text()
    [srun] = re.findall(r"^  (srun .*?) \$\{", text, re.M)
    check([*shlex.split(srun), "--cpus-per-task=8"])
    assert "--cpus-per-task=" in text and 'scontrol requeue Incomplete "$job"' in text


def test_the_jobset_has_only_fields_of_its_crd():
    schema = GRAMMARS["jobset"]["schema"]
    manifest = jobset_manifest()
    check_schema(manifest, schema)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4 and job["backoffLimit"] == 0
    # Kubernetes allows a podFailurePolicy only with this restartPolicy, and the name must be a container's.
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    on_codes, on_disruption = job["podFailurePolicy"]["rules"]
    assert on_codes["onExitCodes"] == {
        "containerName": pod["containers"][0]["name"], "operator": "In", "values": [143]}
    assert on_disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    [rule] = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    wrong = json.loads(json.dumps(manifest))
    wrong["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(AssertionError, match="maxRestart: unknown field"):
        check_schema(wrong, schema)


def test_the_written_manifest_is_the_one_that_is_applied():
    _, text = plan(RUNS["jobset"])
    [written] = re.findall(r"<<'END_OF_FILE'\n(.*?)\nEND_OF_FILE", text, re.S)
    assert yaml.safe_load(written) == json.loads(written)
    assert yaml.safe_load(written)["metadata"]["name"] == "one"


def test_shell_scripts_pass_shellcheck():
    scripts = [str(path) for path in (ROOT / "scripts").rglob("*.sh")]
    assert len(scripts) == 2
    program = shutil.which("shellcheck") or str(pathlib.Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([program, "--enable=quote-safe-variables,check-unassigned-uppercase", *scripts],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Arguments

WORDS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
                 | st.sampled_from(["$HOME", "$(date)", "$$", "a b", "'", '"', "\\", "*", "", "-n", "{}", "`x`", "#",
                                    "--gin.x='%A'", "\n", "é$'\\n'", "!"]), min_size=1, max_size=4)
PRINT = ["printf", r"%s\0"]


def words(output: bytes) -> list[str]:
    return output.decode().split("\0")[:-1]


def expand(text: str) -> str:
    """Returns what Kubernetes makes of a word of a command in a container without variables.

    Source: third_party/forked/golang/expansion/expand.go: $$ is $, and $(NAME) of an unknown name stays.
    """
    return re.sub(r"\$\$|\$\([^)]*\)", lambda match: "$" if match[0] == "$$" else match[0], text)


@pytest.fixture(scope="module")
def echo_folder(tmp_path_factory) -> pathlib.Path:
    """A project whose worker.sh prints its arguments, ended by zero bytes."""
    folder = tmp_path_factory.mktemp("it's a $folder")
    worker = folder / base.WORKER
    worker.parent.mkdir(parents=True)
    worker.write_text("""printf '%s\\0' "$@"\n""")
    return folder


@settings(max_examples=25)
@given(arguments=WORDS)
def test_arguments_reach_workers_unchanged_by_ssh(echo_folder, arguments):
    """ssh and `gcloud ... ssh --command` hand the text to the remote shell; gcloud splits it at blanks and joins it."""
    options = launch.parse(["hosts", "--name=one", "--hosts=a", "--ssh=local", f"--folder={echo_folder}"])
    answer = hosts.Hosts(options, base.Shell(dry_run=False)).call("start", "one", *arguments)
    assert [(code, words(text.encode())) for code, text in answer] == [(0, ["start", "one", *arguments])]

    commands, _ = plan([*TPU_RUN, "--", "printf", *arguments])
    [text] = [argv[-1] for argv in commands if " start one printf " in argv[-1]]
    text = " ".join(text.removeprefix("--command=").split(" ")).replace("cd mlx-pretrain", "true").replace(
        base.WORKER, shlex.quote(str(echo_folder / base.WORKER)), 1)
    done = subprocess.run(["bash", "-c", text], capture_output=True, check=True)
    assert words(done.stdout) == ["start", "one", "printf", *arguments]


@settings(max_examples=25)
@given(arguments=WORDS)
def test_arguments_reach_containers_unchanged(arguments):
    manifest = gke.JobSet.manifest(launch.parse(RUNS["jobset"]), arguments)
    pod = json.loads(json.dumps(manifest))["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert list(map(expand, pod["containers"][0]["command"])) == arguments

    commands, _ = plan([*XPK_RUN, "--", *PRINT, *arguments])
    [text] = [argv[-1].removeprefix("--command=") for argv in commands if argv[0] == "xpk"]
    pasted = GRAMMARS["xpk"]["manifest"].replace("COMMAND_GOES_HERE", text).replace("do sleep 5", "do sleep .01")
    pod = yaml.safe_load(pasted)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    done = subprocess.run([expand(word) for word in pod["containers"][0]["command"]], capture_output=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split(b"\n", 1)[1].rpartition(b"XPK End")[0]  # after the line XPK Start
    assert words(printed) == arguments


def test_xpk_hands_sigterm_to_the_command():
    """Its script sends SIGTERM to the subshell around the command; with `exec` that is the command."""
    code = ("import signal, sys, time; signal.signal(15, lambda *_: sys.exit(print('saved') or 143)); "
            "print('up', flush=True); time.sleep(60)")
    commands, _ = plan([*XPK_RUN, "--", sys.executable, "-c", code])
    text = commands[-1][-1].removeprefix("--command=")
    pasted = GRAMMARS["xpk"]["manifest"].replace("COMMAND_GOES_HERE", text).replace("do sleep 5", "do sleep .01")
    pod = yaml.safe_load(pasted)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    words = [expand(word) for word in pod["containers"][0]["command"]]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert b"XPK Start" in process.stdout.readline() and process.stdout.readline() == b"up\n"
        process.terminate()
        assert b"saved\n" in process.communicate(timeout=30)[0] and process.returncode == 143


# Refusals: one line, before anything is created

@pytest.mark.parametrize("arguments, message", [
    (["tpu_vm", "--name=Big_Run", *PLACE], r".*--name: 'Big_Run' must have at most 40 small letters.*"),
    (["tpu_vm", "--name=one", "--zone=z"], r".*required: --project.*"),
    ([*TPU, *TRAIN], r"error: --accelerator_type and --runtime_version are needed.*"),
    (TPU_RUN, r"error: no command; write it after `--`.*"),
    ([*TPU_RUN, "--slices=2", *TRAIN, "--gin.SLICES=4"], r"error: --gin.SLICES=4: the launcher was told --slices=2.*"),
    ([*TPU_RUN, "--env=A", *TRAIN], r"error: --env=A: must look like NAME=VALUE"),
    ([*TPU_RUN, *TRAIN, "--gin_file=mine.gin"], r"error: --gin_file=mine.gin: mine.gin is not among the files.*"),
    ([*JOBSET_RUN, "--topology=4x5", "--chips_per_host=8", *TRAIN], r"error: --topology=4x5: 20 chips are not.*"),
    ([*JOBSET, "--image=i", *TRAIN], r"error: --accelerator and --topology are needed.*"),
    ([*XPK, "--tpu_type=v5litepod-16", *TRAIN], r"error: --image=: must be the name of a container image"),
    ([*SLURM, "--gpus_per_node=8", "--tasks_per_node=4", *TRAIN], r"error: --tasks_per_node=4: must be 1, or one a.*"),
    ([*SLURM, "--nodes=2", "--shards=4", *TRAIN], r"error: --shards=4: a shard is one process.*"),
    (["hosts", "--name=one", "--hosts=a,a", *TRAIN], r"error: --hosts: none, or one of them twice.*"),
    (["hosts", "--name=one", "--hosts=-oProxyCommand=x", *TRAIN], r"error: '-oProxyCommand=x': not a host"),
    (["hosts", "--name=one", "--hosts_file=absent", *TRAIN], r"error: --hosts_file=absent: No such file.*"),
])
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])  # no dry run: refused before anything is run
    monkeypatch.setenv("PATH", str(pathlib.Path(shutil.which("git")).parent))
    with pytest.raises(SystemExit) as ended:
        launch.main()
    out, err = capsys.readouterr()
    text = err.splitlines()[-1] if ended.value.code == 2 else ended.value.code  # 2 and a usage before: argparse
    assert re.fullmatch(message, text) and not out


@pytest.mark.parametrize("arguments, tool", [
    ([*TPU_RUN, *TRAIN], "gcloud"), ([*XPK_RUN, "--no_build", *TRAIN], "xpk"), ([*JOBSET, "status"], "kubectl")])
def test_a_missing_tool_is_one_line(tmp_path, arguments, tool):
    (tmp_path / "git").symlink_to(shutil.which("git"))
    done = launched(*arguments, path=str(tmp_path))
    assert done.returncode == 1
    [*_, line] = done.stderr.splitlines()
    assert re.fullmatch(rf"error: {tool}: not installed, or not on PATH; see https://\S+.*", line)


def test_disks_that_vanish_are_warned_of():
    _, text = plan([*TPU_RUN, "--", "python", "-m", "mlx_pretrain.train", "--gin_file=gin/runs/pretrain_1p2b.gin"])
    assert "WARNING: neither the command nor its gin files name a gs:// folder" in text
    assert "WARNING" not in plan(RUNS["tpu_vm"])[1]


def test_the_code_is_what_git_knows():
    files = base.code_files()
    assert {"setup.py", "gin/runs/demo.gin", base.WORKER} <= set(files)
    assert not [file for file in files if file.startswith((".git/", ".venv", "runs/"))]


# Documents

PAGES = sorted((ROOT / "docs" / "launch").glob("*.md"))
PREFIX = "python3 scripts/launch.py "


def documented(page: pathlib.Path) -> list[list[str]]:
    """Returns the launch commands of a page's code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line.removeprefix(PREFIX), comments=True) for line in lines if line.startswith(PREFIX)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_documented_commands_run_dry(page):
    commands = documented(page)
    assert any("--dry_run" in arguments for arguments in commands)
    for arguments in commands:
        if "--help" in arguments:
            continue
        printed, _ = plan(arguments)
        for argv in printed:
            check(argv)
        command = launch.parse(arguments).command
        if command[:2] == ["python", "-m"]:
            parse_flags(command[3:], joins=True, shards=True)


def test_each_launcher_has_a_page():
    assert [page.stem for page in PAGES] == ["gke", "hosts", "multislice", "slurm", "tpu_vm"]
    targets = {arguments[0] for page in PAGES for arguments in documented(page)}
    assert targets == set(launch.TARGETS)
    assert {pathlib.Path(page).stem for _, _, page in launch.TARGETS.values()} <= {page.stem for page in PAGES}
