"""TPUs on GKE: a JobSet by kubectl, or the same by xpk. Both run a container image that holds the code."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
from collections.abc import Sequence

from . import base
from .base import LaunchError, Shell

DOCKERFILE = "scripts/launchers/Dockerfile"
GRACE = 300  # seconds between SIGTERM and SIGKILL, for a checkpoint; spot machines have less


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of both."""
    parser.add_argument("--image", help="container image, e.g. REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG; "
                                        "built from the code, pushed and run; needed by `run`")
    parser.add_argument("--no_build", action="store_true", help="the image exists: builds and pushes nothing")
    parser.add_argument("--install", default="compile,gcs", metavar="NAMES",
                        help="files of requirements/ to install in the image (default compile,gcs: JAX for TPUs, "
                             "gs:// paths)")
    parser.add_argument("--slices", type=int, default=1, help="number of slices that work as one job (default 1)")
    parser.add_argument("--max_restarts", type=int, default=20,
                        help="restarts after failures before the job counts as failed (default 20)")


def _prepare(options: argparse.Namespace, shell: Shell) -> list[str]:
    """Checks the flags, builds and pushes the image; returns the command for the container."""
    if not re.fullmatch(r"[a-z0-9][\w./:@-]*", options.image or ""):
        raise LaunchError(f"--image={options.image or ''}: must be the name of a container image")
    if options.slices < 1:
        raise LaunchError(f"--slices={options.slices}: must be at least 1")
    command = base.worker_command(options)
    base.check_slices(command, options.slices)
    base.warn_of_local_folders(shell, command)
    if not options.no_build:
        archive = base.write_archive(shell, options.name)
        shell.run("docker", "build", "--platform=linux/amd64", f"--tag={options.image}", f"--file={DOCKERFILE}",
                  f"--build-arg=INSTALL={options.install.replace(',', ' ')}", "-", stdin=archive)
        shell.run("docker", "push", options.image)
    return command


def escape_for_kubernetes(text: str) -> str:
    """Returns a text that Kubernetes's expansion of $(VARIABLE) in commands turns into `text`: every $ is doubled."""
    return text.replace("$", "$$")


def one_line(command: Sequence[str]) -> str:
    """Returns a command as one line of ASCII for bash, because xpk pastes it into a line of YAML."""
    words = []
    for word in command:
        if word.isascii() and word.isprintable():
            words.append(shlex.quote(word))
        else:
            words.append("$'" + "".join(
                chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}" for byte in word.encode()
            ) + "'")
    return " ".join(words)


class JobSet:
    """Functions of the launcher `jobset`."""

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Adds the flags of this launcher."""
        add_common_flags(parser)
        parser.add_argument("--context", required=True, help="kubectl's context of the cluster (kubectl config "
                                                             "get-contexts)")
        parser.add_argument("--namespace", default="default", help="namespace of Kubernetes (default: default)")
        parser.add_argument("--accelerator", help="label of the node pool, e.g. tpu-v5-lite-podslice; needed by `run`")
        parser.add_argument("--topology", help="topology of a slice, e.g. 4x4; needed by `run`")
        parser.add_argument("--chips_per_host", type=int, default=4, help="TPU chips of a machine (default 4)")
        parser.add_argument("--spot", action="store_true", help="runs on spot nodes")
        parser.add_argument("--service_account", help="account of Kubernetes with access to gs:// (Workload Identity)")

    @staticmethod
    def manifest(options: argparse.Namespace, command: Sequence[str]) -> dict:
        """Returns the manifest.

        Raises:
          LaunchError: the topology is malformed, or not divisible by the chips of a host.
        """
        if not options.accelerator or not re.fullmatch(r"\d+(x\d+){1,2}", options.topology or ""):
            raise LaunchError("--accelerator and --topology are needed, e.g. tpu-v5-lite-podslice and 4x4; for each "
                              "TPU: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus")
        chips = math.prod(map(int, options.topology.split("x")))
        if options.chips_per_host < 1 or chips % options.chips_per_host:
            raise LaunchError(f"--topology={options.topology}: {chips} chips are not divisible among hosts with "
                              f"--chips_per_host={options.chips_per_host}")
        hosts = chips // options.chips_per_host
        selector = {"cloud.google.com/gke-tpu-accelerator": options.accelerator,
                    "cloud.google.com/gke-tpu-topology": options.topology}
        if options.spot:
            selector["cloud.google.com/gke-spot"] = "true"
        container = {
            "name": "worker", "image": options.image, "command": [escape_for_kubernetes(word) for word in command],
            "resources": {"limits": {"google.com/tpu": options.chips_per_host}},
            "securityContext": {"privileged": True},
        }
        pod = {
            "restartPolicy": "Never", "nodeSelector": selector, "hostNetwork": True,
            "dnsPolicy": "ClusterFirstWithHostNet", "terminationGracePeriodSeconds": GRACE, "containers": [container],
        }
        if options.service_account:
            pod["serviceAccountName"] = options.service_account
        # A stop by SIGTERM (143) and the loss of a node fail the job of a slice at once, with the reason
        # PodFailurePolicy; the JobSet then begins anew without counting it. Other failures count.
        job = {
            "parallelism": hosts, "completions": hosts, "backoffLimit": 0,
            "podFailurePolicy": {"rules": [
                {"action": "FailJob", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [143]}},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]},
            "template": {"spec": pod},
        }
        policy = {"maxRestarts": options.max_restarts, "rules": [
            {"name": "preempted", "action": "RestartJobSetAndIgnoreMaxRestarts",
             "onJobFailureReasons": ["PodFailurePolicy"]}]}
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet",
            "metadata": {
                "name": options.name, "namespace": options.namespace,
                "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}},
            "spec": {"failurePolicy": policy, "replicatedJobs": [
                {"name": "slice", "replicas": options.slices, "template": {"spec": job}}]},
        }

    @staticmethod
    def _kubectl(options: argparse.Namespace) -> tuple[str, ...]:
        return ("kubectl", f"--context={options.context}", f"--namespace={options.namespace}")

    @classmethod
    def run(cls, options: argparse.Namespace, shell: Shell) -> None:
        """Builds the image, writes the manifest and applies it; the cluster restarts the job by itself."""
        cls.manifest(options, [])  # mistakes in flags before minutes of building
        text = json.dumps(cls.manifest(options, _prepare(options, shell)), indent=1, ensure_ascii=False)
        path = base.folder(options.name) / "jobset.json"
        shell.write(path, text.encode())
        shell.run(*cls._kubectl(options), "apply", f"--filename={path}")

    @classmethod
    def status(cls, options: argparse.Namespace, shell: Shell) -> None:
        """Prints the JobSet and its pods."""
        shell.run(*cls._kubectl(options), "get", "jobset", options.name, "--output=wide")
        shell.run(*cls._kubectl(options), "get", "pods", cls._selector(options), "--output=wide")

    @classmethod
    def logs(cls, options: argparse.Namespace, shell: Shell) -> None:
        """Prints the end of the output of each pod."""
        shell.run(*cls._kubectl(options), "logs", cls._selector(options), "--prefix", f"--tail={options.lines}")

    @staticmethod
    def _selector(options: argparse.Namespace) -> str:
        return f"--selector=jobset.sigs.k8s.io/jobset-name={options.name}"

    @classmethod
    def delete(cls, options: argparse.Namespace, shell: Shell) -> None:
        """Deletes the JobSet; its processes get SIGTERM, save and end. Node pools stay."""
        shell.run(*cls._kubectl(options), "delete", "jobset", options.name)


class Xpk:
    """Functions of the launcher `xpk`."""

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Adds the flags of this launcher."""
        add_common_flags(parser)
        parser.add_argument("--cluster", required=True, help="cluster that `xpk cluster create` has made")
        parser.add_argument("--project", required=True, help="Google Cloud project")
        parser.add_argument("--zone", required=True, help="zone of the cluster")
        parser.add_argument("--tpu_type", help="e.g. v5litepod-16; needed by `run`")
        parser.add_argument("--priority", default="medium", choices=["very-low", "low", "medium", "high", "very-high"])

    @staticmethod
    def _place(options: argparse.Namespace) -> tuple[str, ...]:
        return (f"--cluster={options.cluster}", f"--project={options.project}", f"--zone={options.zone}")

    @classmethod
    def run(cls, options: argparse.Namespace, shell: Shell) -> None:
        """Builds the image and creates the workload; the cluster restarts it by itself."""
        if not options.tpu_type:
            raise LaunchError("--tpu_type is needed, e.g. v5litepod-16")
        command = _prepare(options, shell)
        # xpk runs the text as `(TEXT) & PID=$!` in bash: with `exec`, the SIGTERM for that PID reaches Python. It
        # restarts after the codes 42 and 127 to 255; 1 is what a process ends with whose peer has died.
        text = escape_for_kubernetes(f"exec {one_line(command)}")
        shell.run("xpk", "workload", "create", f"--workload={options.name}", *cls._place(options),
                  f"--tpu-type={options.tpu_type}", f"--num-slices={options.slices}", f"--docker-image={options.image}",
                  f"--priority={options.priority}", f"--max-restarts={options.max_restarts}",
                  "--restart-on-exit-codes=1", f"--termination-grace-period-seconds={GRACE}", f"--command={text}")

    @classmethod
    def status(cls, options: argparse.Namespace, shell: Shell) -> None:
        """Prints the workload's line of the list."""
        shell.run("xpk", "workload", "list", *cls._place(options), f"--filter-by-job=^{options.name}$")

    @staticmethod
    def logs(options: argparse.Namespace, shell: Shell) -> None:
        """Prints the end of the output of each pod, from the cluster that kubectl's current context names."""
        shell.run("kubectl", "logs", f"--selector=xpk.google.com/workload={options.name}", "--prefix",
                  f"--tail={options.lines}")

    @classmethod
    def delete(cls, options: argparse.Namespace, shell: Shell) -> None:
        """Deletes the workload; its processes get SIGTERM, save and end. The cluster stays."""
        shell.run("xpk", "workload", "delete", f"--workload={options.name}", *cls._place(options), "--force")
