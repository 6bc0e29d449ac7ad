"""Makes llama/ and qwen2/: small decoders with random weights, and the logits transformers computes with them.

    pip install torch==2.13.0 transformers==5.24.0 && python make_decoder_goldens.py
"""

import pathlib

import torch
import transformers
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent
SIZES = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 500.0, "rms_norm_eps": 1e-6,
         "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MODELS = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
          "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)}  # fmt: skip


def main() -> None:
    for name, (config_type, model_type) in MODELS.items():
        torch.manual_seed(0)
        model = model_type(config_type(**SIZES)).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                # Norms start at one, biases at zero, and small weights hide what rotary positions do.
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in path))
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
        tokens = torch.randint(0, 48, (2, 20))
        with torch.inference_mode():
            save_file({"tokens": tokens.int(), "logits": model(tokens).logits}, FOLDER / name / "golden.safetensors")


if __name__ == "__main__":
    main()
