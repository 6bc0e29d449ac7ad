"""Packaging of the five top-level packages."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
PACKAGES = ("mlx_pretrain", "data_mixtures", "raters", "evals", "video", "pipeline")
EXTRAS = ("data", "raters", "evals", "video", "gcs", "compile", "wandb", "docs")


def requirements(name: str) -> list[str]:
    """Returns the direct requirements in requirements/<name>.in, without its `-r` lines."""
    lines = (ROOT / "requirements" / f"{name}.in").read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


setup(
    name="mlx-pretrain",
    version="0.1.0",
    description="Pretraining of multilingual language models on JAX: mixtures, training, raters, evaluation",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    # The gin files become part of mlx_pretrain: a top-level gin/ would lie in the folder of the library of that name.
    packages=[*find_packages(include=[pattern for p in PACKAGES for pattern in (p, f"{p}.*")]), "mlx_pretrain.gin"],
    package_dir={"mlx_pretrain.gin": "gin"},
    package_data={"": ["*.html.j2"], "mlx_pretrain.gin": ["**/*.gin"]},
    # Programs that find this one by themselves: lmms-eval lists the model among its own.
    entry_points={"lmms_eval.models": ["chosen_frames = video.lmms_eval_plugin:MANIFEST"]},
    install_requires=requirements("core"),
    extras_require={
        **{name: requirements(name) for name in EXTRAS},
        "beam": requirements("beam"),  # not among EXTRAS: its versions are not those that the tests take
        "test": [line for name in (*EXTRAS, "test") for line in requirements(name)],
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
    },
)
