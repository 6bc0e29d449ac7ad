"""Conversion of our own SentencePiece tokenizers to Hugging Face's tokenizer.json, with the same ids.

Two exceptions: a special token spelt out in a text ("</s>") becomes that token; and in long texts SentencePiece, which
adds up scores in float32, may take the second best of two segmentations whose likelihoods differ by less than 1e-3.
"""

from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, processors

from mlx_pretrain.data.token_store import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from mlx_pretrain.data.tokenizers import Tokenizer

_SPACE = "▁"


def tokenizer_json(tokenizer: Tokenizer) -> tuple[str, dict[str, Any]]:
    """Returns the contents of tokenizer.json and tokenizer_config.json; BOS is put before texts, as in training."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    scores = {piece.piece: piece.score for piece in proto.pieces}
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        vocabulary = {piece: i for i, piece in enumerate(scores)}
        model = models.BPE(vocabulary, _merges(scores), unk_token=proto.pieces[UNK_ID].piece, fuse_unk=True,
                           byte_fallback=True)
    else:
        model = models.Unigram(list(scores.items()), UNK_ID, byte_fallback=True)
    converted = tokenizers.Tokenizer(model)
    converted.normalizer = normalizers.Replace(" ", _SPACE)
    converted.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    names = {name: proto.pieces[i].piece
             for name, i in (("pad", PAD_ID), ("eos", EOS_ID), ("unk", UNK_ID), ("bos", BOS_ID))}
    converted.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names.values()])
    # SentencePiece cuts a text at user-defined pieces before anything else.
    converted.add_tokens([AddedToken(piece.piece, normalized=False) for piece in proto.pieces
                          if piece.type == piece.USER_DEFINED])
    converted.post_processor = processors.TemplateProcessing(
        single=f"{names['bos']} $A", pair=f"{names['bos']} $A $B", special_tokens=[(names["bos"], BOS_ID)])
    return converted.to_str(), {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        **{f"{name}_token": piece for name, piece in names.items()}}


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Returns all pairs of pieces that make another, in the order in which SentencePiece merges: by its score."""
    ids = {piece: i for i, piece in enumerate(scores)}
    merges = []
    for piece, score in scores.items():
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(-score, ids[left], ids[right], left, right) for left, right in halves
                   if left in ids and right in ids]
    return [(left, right) for *_, left, right in sorted(merges)]
