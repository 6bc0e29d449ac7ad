"""Memory and time of loading a LLaVA-OneVision, on this machine.

    python benchmarks/llava_memory.py [--size 0.5b] [--dtype bfloat16] [--folder DIR]

Writes a folder of that size with drawn weights in float16, as the published checkpoints have them, and loads it in a
process of its own. The memory is the peak of the resident set above that of a process that only imports the program,
without the parameters themselves, which stay. The last line is one JSON object.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "video" / "goldens" / "llava_onevision"
VISION = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
          "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False}  # fmt: skip
TEXT = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 152_000, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": False},
}  # fmt: skip


def shapes(text: dict) -> dict[str, tuple[int, ...]]:
    """Returns transformers' names of all tensors, with their shapes."""
    wide, mlp, patch = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    embed, hidden, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    keys = embed // heads * text["num_key_value_heads"]
    tensors = {"image_newline": (embed,), "language_model.model.embed_tokens.weight": (text["vocab_size"], embed),
               "language_model.model.norm.weight": (embed,)}
    if not text["tie_word_embeddings"]:
        tensors["language_model.lm_head.weight"] = (text["vocab_size"], embed)

    def linear(name: str, into: int, out: int, bias: bool = True) -> None:
        tensors[f"{name}.weight"] = out, into
        if bias:
            tensors[f"{name}.bias"] = (out,)

    linear("multi_modal_projector.linear_1", wide, embed)
    linear("multi_modal_projector.linear_2", embed, embed)
    tower = "vision_tower.vision_model"
    tensors[f"{tower}.embeddings.patch_embedding.weight"] = wide, 3, patch, patch
    tensors[f"{tower}.embeddings.patch_embedding.bias"] = (wide,)
    tensors[f"{tower}.embeddings.position_embedding.weight"] = (VISION["image_size"] // patch) ** 2, wide
    for n in range(VISION["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{n}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{part}", wide, wide)
        linear(f"{layer}.mlp.fc1", wide, mlp)
        linear(f"{layer}.mlp.fc2", mlp, wide)
        for norm in ("layer_norm1", "layer_norm2"):
            tensors |= {f"{layer}.{norm}.weight": (wide,), f"{layer}.{norm}.bias": (wide,)}
    for n in range(text["num_hidden_layers"]):
        layer = f"language_model.model.layers.{n}"
        for part, out in (("q", embed), ("k", keys), ("v", keys)):
            linear(f"{layer}.self_attn.{part}_proj", embed, out)
        linear(f"{layer}.self_attn.o_proj", embed, embed, bias=False)
        for part in ("gate", "up"):
            linear(f"{layer}.mlp.{part}_proj", embed, hidden, bias=False)
        linear(f"{layer}.mlp.down_proj", hidden, embed, bias=False)
        tensors |= {f"{layer}.{norm}.weight": (embed,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return tensors


def make_folder(folder: pathlib.Path, size: str) -> int:
    """Writes a model; returns the bytes of its weights."""
    import numpy as np

    from mlx_pretrain.convert.safetensors_files import write_file

    text = {"model_type": "qwen2", "max_position_embeddings": 32_768, "rope_theta": 1e6, "eos_token_id": 258,
            **TEXT[size]}
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llava_onevision", "vision_config": VISION, "text_config": text}))
    shutil.copy(GOLDEN / "tokenizer.json", folder)
    tensors, rng = shapes(text), np.random.default_rng(0)
    write_file(folder / "model.safetensors", tensors, np.float16,
               lambda name: rng.standard_normal(tensors[name], np.float32).astype(np.float16) * np.float16(0.02))
    return (folder / "model.safetensors").stat().st_size


def stage(name: str, folder: pathlib.Path, dtype: str) -> None:
    """Loads the model, or nothing; prints the seconds, and in bytes the parameters and the peak of the resident set."""
    import jax

    from video.llm.loading import load_video_llm

    jax.block_until_ready(jax.numpy.zeros(1))  # starts the backend
    start, size = time.perf_counter(), 0
    if name == "load":
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(load_video_llm(folder, dtype=dtype).params))
    seconds, status = time.perf_counter() - start, pathlib.Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "parameters": size, "peak": peak * 1024}))


def child(*arguments: str) -> dict:
    """Runs this script again, in a process whose memory is its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, stdout=subprocess.PIPE, text=True,
                          check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(TEXT), default="0.5b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--folder", help="where to write the model; a temporary folder otherwise")
    parser.add_argument("--stage", choices=("import", "load"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage(options.stage, pathlib.Path(options.folder), options.dtype)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        stored = make_folder(pathlib.Path(folder), options.size)
        base, loaded = (child("--stage", name, "--folder", folder, "--dtype", options.dtype)
                        for name in ("import", "load"))
    above = loaded["peak"] - base["peak"] - loaded["parameters"]
    print(f"{options.size}, {options.dtype}: {stored / 1e6:,.0f} MB stored, {loaded['parameters'] / 1e6:,.0f} MB of "
          f"parameters, {above / 1e6:,.0f} MB besides, {loaded['seconds']:.1f} s")
    print(json.dumps({"size": options.size, "dtype": options.dtype, "stored": stored, "above": above, **loaded}))


if __name__ == "__main__":
    main()
