"""A small corpus in two languages, and pipelines on it."""

import json

import pytest

from mlx_pretrain.models.decoder import DecoderConfig
from pipeline.settings import PipelineConfig


def write_documents(folder, language, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    records = [{"id": f"{language}{i}", "source": "web", "text": f"This is sentence number {i} of a text. " * 3}
               for i in numbers]
    (folder / f"{language}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


MODEL = DecoderConfig(vocab_size=300, embed_dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, mlp_dim=48,
                      max_length=64)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Makes a pipeline in the current, temporary folder; `config(steps=3)` changes a setting."""
    monkeypatch.chdir(tmp_path)
    for language in ("de", "en"):
        write_documents(tmp_path / "documents", language, range(20))

    def make(**changes):
        return PipelineConfig(**{
            "documents": "documents", "output": "out", "files": "{language}.*", "model": MODEL,
            "rater_documents": "documents/{language}.jsonl", **changes})

    return make
