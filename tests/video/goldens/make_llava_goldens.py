"""Makes llava/: a small LLaVA with a SigLIP tower and random weights, and the logits transformers computes with it.

    pip install torch==2.13.0 transformers==5.23.0 && python make_llava_goldens.py
"""

import pathlib

import torch
import transformers
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent / "llava"
IMAGE = 47


def main() -> None:
    torch.manual_seed(0)
    vision = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=29, patch_size=7)
    text = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=500.0, rms_norm_eps=1e-6,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=16, vision_feature_layer=-2,
        vision_feature_select_strategy="full")  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms start at one, and small weights hide what positions do
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    model.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    images = torch.randint(0, 256, (2, 3, 29, 29))
    words = torch.randint(3, 46, (12,))
    frames = torch.full((16,), IMAGE)
    tokens = torch.cat([words[:4], frames, words[4:6], frames, words[6:]])[None]
    with torch.inference_mode():
        logits = model(input_ids=tokens, pixel_values=(images / 255 - 0.5) / 0.5).logits
    save_file({"images": images.permute(0, 2, 3, 1).to(torch.uint8).contiguous(), "tokens": tokens.int(),
               "logits": logits}, FOLDER / "golden.safetensors")


if __name__ == "__main__":
    main()
