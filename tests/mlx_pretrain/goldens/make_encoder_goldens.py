"""Makes the encoders, tokenizer and outputs in this folder with torch and transformers (5.23 for those here).

    python tests/mlx_pretrain/goldens/make_encoder_goldens.py
"""

import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

FOLDER = pathlib.Path(__file__).parent
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}

# Article 1 of the Universal Declaration of Human Rights, its beginning.
TEXTS = {
    "ar": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.",
    "en": "All human beings are born free and equal in dignity and rights.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "ja": "すべての人間は、生まれながらにして自由である。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 존엄하다.",
    "ru": "Все люди рождаются свободными и равными в своём достоинстве.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน",
    "zh": "人人生而自由，在尊严和权利上一律平等。",
}


def make_encoder(name: str, config: transformers.PreTrainedConfig, with_types: bool) -> None:
    """One randomly initialised model with its hidden states for rows of three lengths."""
    torch.manual_seed(1)
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():  # biases and norms, too, are to matter
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(FOLDER / name)
    lengths, width = torch.tensor([[12], [9], [1]]), 12
    mask = (torch.arange(width) < lengths).long()
    tokens = torch.where(mask > 0, torch.randint(4, config.vocab_size, mask.shape), config.pad_token_id)
    types = (torch.arange(width) >= 5).long() * mask if with_types else torch.zeros_like(mask)
    with torch.inference_mode():
        hidden = model(tokens, attention_mask=mask, token_type_ids=types).last_hidden_state
    golden = {"tokens": tokens, "segment_ids": mask, "token_types": types, "hidden": hidden.contiguous()}
    save_file(golden, FOLDER / name / "golden.safetensors")


def make_tokenizer() -> None:
    """A unigram tokenizer built as XLM-R's, with limits that must not take effect, and ids of TEXTS."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=260, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(list(TEXTS.values())[:8], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = {language: fast(text)["input_ids"] for language, text in TEXTS.items()}
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64, pad_id=1, pad_token="<pad>")
    tokenizer.save(str(FOLDER / "tokenizer.json"), pretty=False)
    rows = {language: {"text": TEXTS[language], "ids": ids[language]} for language in TEXTS}
    (FOLDER / "tokenizer_ids.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    make_encoder("bert", transformers.BertConfig(
        vocab_size=40, max_position_embeddings=16, type_vocab_size=2, layer_norm_eps=1e-12, **SHAPE), True)
    make_encoder("xlm_roberta", transformers.XLMRobertaConfig(
        vocab_size=40, max_position_embeddings=18, type_vocab_size=1, layer_norm_eps=1e-5, **SHAPE), False)
    make_tokenizer()
