"""MaxText as the rival of the training benchmark: its own environment, its own process, the same shape.

The shape: embedding 256, 4 layers, 4 heads of 64, SwiGLU 1024, vocabulary 8192, untied head, sequence 512, batch 8:
8,390,912 parameters and 4096 tokens a step, on one CPU device. `remat_policy=none packing=false` is the fastest of
MaxText's own settings here; its other settings are its defaults (AdamW, gradient clipping at 1, float32 parameters).

MaxText pins other versions than this project, so it needs a separate environment (Python 3.12, 2 GB):

    python3.12 -m venv maxtext-env
    maxtext-env/bin/pip install uv
    maxtext-env/bin/uv pip install --python maxtext-env/bin/python --no-deps maxtext==0.2.5
    maxtext-env/bin/uv pip install --python maxtext-env/bin/python --resolution=lowest -r maxtext-env/lib/python3.12/\
site-packages/dependencies/requirements/generated_requirements/decoupled-requirements.txt

and then pass its interpreter to the benchmark: `--maxtext_python=maxtext-env/bin/python`. Linux only: CPU time and
memory are read from /proc.
"""

import itertools
import os
import re
import statistics
import subprocess
import time
from typing import Any

from mlx_pretrain.errors import InputError

TOKENS_PER_STEP = 8 * 512
# The first steps' lines come from asynchronous dispatch and warm-up, not from the steady state.
_UNSTEADY_STEPS = 6

_SETTINGS = (
    "run_name=peer",
    "hardware=cpu",
    "dataset_type=synthetic",
    "enable_checkpointing=false",
    "base_emb_dim=256",
    "base_num_decoder_layers=4",
    "base_num_query_heads=4",
    "base_num_kv_heads=4",
    "head_dim=64",
    "base_mlp_dim=1024",
    "vocab_size=8192",
    "max_target_length=512",
    "per_device_batch_size=8",
    "attention=dot_product",
    "remat_policy=none",
    "packing=false",
    "skip_jax_distributed_system=true",
    "enable_tensorboard=false",
    "log_config=false",
    # By default MaxText keeps compiled programs in the home folder: the first step would be cold only once.
    "jax_cache_dir=",
)
_STEP = re.compile(r"completed step: (\d+), .*\bloss: ([0-9.naif+-]+)")


def run(python: str, scratch: str, steps: int = 20, dtype: str = "bfloat16") -> dict[str, Any]:
    """Trains MaxText for `steps` steps and times them from the outside, by the arrival of its log lines.

    Args:
      python: the interpreter of MaxText's environment (see above).
      scratch: an existing folder; MaxText works in it, and its output is kept there as maxtext-DTYPE.log.
      steps: training steps, at least 8; the first 6 are not timed.
      dtype: data type of activations and matrix products, "bfloat16" or "float32".

    Returns:
      "tokens_per_s": of the median interval between steps; "seconds": those intervals; "cpu_s_per_step": CPU seconds of
      all threads per step, mean over the same steps; "first_step_s": from the start of the process until its first step
      is reported; "peak_rss_gb": peak resident memory in 1e9 bytes; "losses": of every step.

    Raises:
      InputError: the environment is missing or is not MaxText's, or the training failed.
    """
    if steps < _UNSTEADY_STEPS + 2:
        raise InputError(f"steps={steps}: at least {_UNSTEADY_STEPS + 2}, the first {_UNSTEADY_STEPS} are not timed")
    if dtype not in ("bfloat16", "float32"):
        raise InputError(f"dtype={dtype}: bfloat16 or float32")
    python = os.path.abspath(python)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE", "HF_HUB_OFFLINE": "1"}
    command = [python, "-u", "-m", "maxtext.trainers.pre_train.train", _base_configuration(python, environment)]
    command += [*_SETTINGS, f"base_output_directory={os.path.abspath(scratch)}", f"steps={steps}", f"dtype={dtype}"]
    arrivals, cpu_seconds, losses = [], [], []
    peak_bytes = 0
    log = os.path.join(scratch, f"maxtext-{dtype}.log")
    start = time.perf_counter()
    with (
        open(log, "w") as copy,
        subprocess.Popen(
            command, cwd=scratch, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            for line in process.stdout:
                copy.write(line)
                if step := _STEP.search(line):
                    arrivals.append(time.perf_counter() - start)
                    losses.append(float(step[2]))
                    cpu_seconds.append(_cpu_seconds(process.pid))
                    peak_bytes = _peak_bytes(process.pid)
        finally:
            # An interrupted benchmark must not leave the training running; after a normal end this does nothing.
            process.kill()
    if len(arrivals) != steps:
        raise InputError(f"{log}: MaxText finished {len(arrivals)} of {steps} steps (exit code {process.returncode})")
    steady = arrivals[_UNSTEADY_STEPS - 1 :]
    seconds = [after - before for before, after in itertools.pairwise(steady)]
    return {
        "tokens_per_s": TOKENS_PER_STEP / statistics.median(seconds),
        "seconds": seconds,
        "cpu_s_per_step": (cpu_seconds[-1] - cpu_seconds[_UNSTEADY_STEPS - 1]) / len(seconds),
        "first_step_s": arrivals[0],
        "peak_rss_gb": peak_bytes / 1e9,
        "losses": losses,
    }


def _base_configuration(python: str, environment: dict[str, str]) -> str:
    """The path of MaxText's base.yml, which also shows that `python` is an interpreter that has MaxText."""
    find = "import importlib.util as u; print(u.find_spec('maxtext').submodule_search_locations[0])"
    try:
        found = subprocess.run([python, "-c", find], env=environment, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise InputError(
            f"{python}: not an interpreter with MaxText; benchmarks/maxtext_peer.py describes its environment"
        ) from None
    return os.path.join(found.stdout.strip(), "configs", "base.yml")


def _cpu_seconds(pid: int) -> float:
    """CPU seconds of all threads of a running process, user and system."""
    with open(f"/proc/{pid}/stat") as file:
        # Field 2, the program's name in parentheses, may hold spaces; utime and stime are fields 14 and 15.
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_bytes(pid: int) -> int:
    """Peak resident memory of a running process. Not from wait4, which counts the parent's memory at the fork."""
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1]) * 1024
