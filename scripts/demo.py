"""`make demo`: the pipeline on the sample text, in bfloat16 where this CPU multiplies it in hardware.

Arguments go to `python -m pipeline`, e.g. `make demo ARGS=--gin.pipeline.steps=600`.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def fast_bfloat16() -> bool:
    """Returns whether this CPU multiplies bfloat16 in hardware; float32 is faster on others."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    return cpuinfo.exists() and bool({"avx512_bf16", "amx_bf16"} & set(cpuinfo.read_text().split()))


if __name__ == "__main__":
    os.chdir(ROOT)
    flags = ["--gin.DecoderConfig.dtype=bfloat16"] if fast_bfloat16() else []
    os.execv(sys.executable, [sys.executable, "-m", "pipeline", "--gin_file=gin/pipeline/demo.gin", *flags,
                              *sys.argv[1:]])
