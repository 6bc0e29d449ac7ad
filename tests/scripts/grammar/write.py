"""Writes the grammars beside it: the flags of every command that scripts/launch.py calls, from the tools themselves.

    python tests/scripts/grammar/write.py --slurm=REPOSITORY@TAG --docker=REPOSITORY@TAG --jobset=REPOSITORY@TAG

Needs gcloud, kubectl, and xpk in this Python's environment; the repositories are clones (bare ones too) of
github.com/SchedMD/slurm, github.com/docker/cli and github.com/kubernetes-sigs/jobset. A grammar has
`commands`: name -> {flags: {flag: "bool", "value" or the list of allowed values}, required: [flags]}.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import yaml

HERE = pathlib.Path(__file__).parent
GCLOUD = [f"compute tpus queued-resources {name}" for name in ("create", "delete", "describe", "list", "scp", "ssh")]
GCLOUD.append("compute tpus tpu-vm list")
XPK = ["workload create", "workload delete", "workload list"]
KUBECTL = ["apply", "get", "logs", "delete"]


def output(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def source(place: str, path: str) -> str:
    repository, _, tag = place.rpartition("@")
    return output("git", "-C", repository, "show", f"{tag}:{path}")


def write(name: str, version: str, origin: str, **content: object) -> None:
    text = json.dumps({"tool": name, "version": version, "source": origin, **content}, indent=1)
    (HERE / f"{name}.json").write_text(f"{text}\n")


def gcloud() -> None:
    root = pathlib.Path(shutil.which("gcloud")).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("completions", root / "data/cli/gcloud_completions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree = module.STATIC_COMPLETION_CLI_TREE
    anywhere = {flag: kind for flag, kind in tree["flags"].items() if flag in ("--project", "--quiet", "--format")}
    commands = {}
    for name in GCLOUD:
        node = tree
        for word in name.split():
            node = node["commands"][word]
        commands[name] = {"flags": {**{k: v if isinstance(v, (str, list)) else "value" for k, v in
                                       node["flags"].items()}, **anywhere}, "required": []}
    commands["compute tpus queued-resources create"]["required"] = ["--runtime-version"]
    version = re.search(r"Google Cloud SDK (\S+)", output("gcloud", "--version"))[1]
    write("gcloud", version, "data/cli/gcloud_completions.py of the Google Cloud SDK; required flags from its help",
          commands=commands)


def xpk() -> None:
    from xpk.parser.core import set_parser

    parser = argparse.ArgumentParser()
    set_parser(parser)
    commands = {}
    for name in XPK:
        node = parser
        for word in name.split():
            [choice] = [action for action in node._actions if isinstance(action, argparse._SubParsersAction)]
            node = choice.choices[word]
        flags, required = {}, []
        for action in node._actions:
            for flag in action.option_strings:
                allowed = action.choices and list(action.choices)
                flags[flag] = "bool" if action.nargs == 0 else allowed or "value"
            required += action.option_strings if action.required else []
        commands[name] = {"flags": flags, "required": required}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["xpk", "workload", "create", "--dry-run", "--skip-validation", "--cluster=cluster", "--workload=workload",
             "--tpu-type=v5litepod-16", "--num-slices=2", "--docker-image=image", "--project=project",
             "--zone=us-east5-b", "--command=COMMAND_GOES_HERE", "--max-restarts=20", "--restart-on-exit-codes=1",
             "--termination-grace-period-seconds=300", f"--output-manifest-file={folder}/manifest.yaml"],
            check=True, capture_output=True)
        manifest = pathlib.Path(folder, "manifest.yaml").read_text()
    write("xpk", importlib.metadata.version("xpk"), "argparse parsers of the package xpk on PyPI; `manifest` is its "
          "output of a dry run with the command COMMAND_GOES_HERE", commands=commands, manifest=manifest)


def kubectl() -> None:
    def listed(*argv: str) -> dict[str, str]:
        return {f"--{flag}": "bool" if value in ("true", "false") else "value"
                for flag, value in re.findall(r"^    (?:-\w, )?--([\w-]+)=(\S*):$", output("kubectl", *argv), re.M)}

    anywhere = listed("options")
    version = json.loads(output("kubectl", "version", "--client", "--output=json"))["clientVersion"]["gitVersion"]
    write("kubectl", version, "kubectl COMMAND --help and kubectl options",
          commands={name: {"flags": {**anywhere, **listed(name, "--help")}, "required": []} for name in KUBECTL})


def slurm(place: str) -> None:
    kinds = {"no_argument": "bool", "required_argument": "value", "optional_argument": "value"}
    commands: dict[str, dict] = {"sbatch": {}, "srun": {}, "squeue": {}, "scancel": {}}
    options = source(place, "src/common/slurm_opt.c")
    for body in re.findall(r"slurm_cli_opt_t slurm_opt_\w+ = \{(.*?)\};", options, re.S):
        name, kind = re.search(r'\.name = "([\w-]+)"', body), re.search(r"\.has_arg = (\w+)", body)
        for command in ("sbatch", "srun"):
            if name and kind and re.search(rf"\.set_func(_{command})? =", body):
                commands[command][f"--{name[1]}"] = kinds[kind[1]]
    for command, path in (("squeue", "src/squeue/opts.c"), ("scancel", "src/scancel/opt.c")):
        for name, kind in re.findall(r'\{"([\w-]+)",\s*(\w+_argument),', source(place, path)):
            commands[command][f"--{name}"] = kinds[kind]
    commands["scontrol requeue"] = {}
    write("slurm", place.rpartition("@")[2], "github.com/SchedMD/slurm: src/common/slurm_opt.c, src/squeue/opts.c, "
          "src/scancel/opt.c; scontrol: its manual", commands={
              name: {"flags": flags, "required": []} for name, flags in commands.items()})


def docker(place: str) -> None:
    commands = {}
    for name in ("build", "push"):
        rows = re.findall(r"^\| (.*?) +\| `(\w+)` ", source(place, f"docs/reference/commandline/image_{name}.md"), re.M)
        commands[name] = {"flags": {flag: "bool" if kind == "bool" else "value" for cell, kind in rows
                                    for flag in re.findall(r"`(--[\w-]+)`", cell)}, "required": []}
    write("docker", place.rpartition("@")[2], "github.com/docker/cli: docs/reference/commandline", commands=commands)


def fields(schema: dict, value: object) -> dict:
    """Returns the part of an OpenAPI schema that describes the fields a value has, without descriptions."""
    kept = {key: schema[key] for key in ("type", "enum", "required", "format", "minimum", "maximum", "pattern",
                                         "x-kubernetes-int-or-string") if key in schema}
    if isinstance(value, dict) and "properties" in schema:
        kept["properties"] = {key: fields(schema["properties"][key], item) for key, item in value.items()
                              if key in schema["properties"]}
    elif "additionalProperties" in schema:
        kept["additionalProperties"] = fields(schema["additionalProperties"], None)
    elif isinstance(value, list) and "items" in schema:
        parts = [fields(schema["items"], item) for item in value]
        kept["items"] = parts[0]
        for part in parts[1:]:
            if "properties" in part:
                kept["items"]["properties"] |= part["properties"]
    return kept


def jobset(place: str) -> None:
    sys.path.insert(0, str(HERE.parents[2] / "scripts"))
    import launch
    from launchers import gke

    manifest = gke.JobSet.manifest(launch.parse([
        "jobset", "--name=one", "--context=c", "--image=i", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4",
        "--spot", "--service_account=a"]), ["python"])
    [crd] = yaml.safe_load_all(source(place, "config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml"))
    [version] = [version for version in crd["spec"]["versions"] if version["name"] == "v1alpha2"]
    schema = version["schema"]["openAPIV3Schema"]
    write("jobset", place.rpartition("@")[2], "github.com/kubernetes-sigs/jobset: the CRD; only the fields that the "
          "launcher writes", schema=fields(schema, manifest))


if __name__ == "__main__":
    flags = argparse.ArgumentParser()
    for repository in ("slurm", "docker", "jobset"):
        flags.add_argument(f"--{repository}", required=True)
    places = flags.parse_args()
    gcloud()
    xpk()
    kubectl()
    slurm(places.slurm)
    docker(places.docker)
    jobset(places.jobset)
