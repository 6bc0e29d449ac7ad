"""Makes llava_onevision/: a small LLaVA-OneVision with random weights, and what transformers computes with it.

    pip install torch==2.13.0 torchvision==0.28.0 transformers==5.24.0 jinja2 && python make_llava_onevision_goldens.py

golden.safetensors holds a question on a video of three frames, as transformers' processor writes it, another without a
video, and the logits of both. The weights are stored in bfloat16, and computed with in float32.
"""

import pathlib

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

FOLDER = pathlib.Path(__file__).parent / "llava_onevision"
SIDE = 35  # pixels; 5 x 5 patches of 7, pooled to 3 x 3
QUESTION = "What moved?"
# The template of the published checkpoints, without its parts for images and for answers.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_processor() -> transformers.LlavaOnevisionProcessor:
    """A tokenizer of bytes with Qwen2's special tokens, and the published checkpoints' way to prepare frames."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    prepared = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(**prepared), fast,
        transformers.LlavaOnevisionVideoProcessor(**prepared), num_image_tokens=25,
        vision_feature_select_strategy="full", chat_template=TEMPLATE)


def main() -> None:
    torch.manual_seed(0)
    processor = make_processor()
    video_token = processor.video_token_id
    vision = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=7,
        vision_use_head=False)
    text = transformers.Qwen2Config(
        vocab_size=264, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rope_theta=500.0, rms_norm_eps=1e-6,
        tie_word_embeddings=True, eos_token_id=processor.tokenizer.eos_token_id)
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id,
        video_token_index=video_token, image_grid_pinpoints=[[SIDE, SIDE]])
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # small weights and zero biases hide mistakes
            drawn = torch.randn_like(parameter) * 0.25 + (name.endswith("norm.weight") or "layernorm.weight" in name)
            parameter.copy_(drawn.to(torch.bfloat16).float())
    model.save_pretrained(FOLDER)
    processor.save_pretrained(FOLDER)
    frames = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)

    def ask(content: list[dict], **videos) -> dict[str, torch.Tensor]:
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return processor(text=prompt, return_tensors="pt", **videos)

    question = {"type": "text", "text": QUESTION}
    seen, unseen = ask([{"type": "video"}, question], videos=frames), ask([question])
    assert (seen["input_ids"] == video_token).sum() == 3 * 9 + 1
    with torch.inference_mode():
        save_file({
            "frames": torch.from_numpy(frames), "tokens": seen["input_ids"].int(), "logits": model(**seen).logits,
            "text_tokens": unseen["input_ids"].int(), "text_logits": model(**unseen).logits,
        }, FOLDER / "golden.safetensors")
    model.to(torch.bfloat16).save_pretrained(FOLDER)
    print({path.name: path.stat().st_size for path in sorted(FOLDER.iterdir())})


if __name__ == "__main__":
    main()
