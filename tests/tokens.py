"""A made-up tokenizer for the tiny models, and backbones made of both."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from families import VOCAB
from locas.backbone import Backbone, start_token, tokenizer_hash

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]


def word_tokenizer(*, bos: bool = True, eos: bool = True, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word, "w3" to "w96"; with a BOS that it puts before every text, unless told otherwise."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if bos and adds_bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = ({"bos_token": "<s>"} if bos else {}) | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **names)


def words(ids: Tensor) -> str:
    """The text of token ids."""
    return " ".join(WORDS[i] for i in ids.tolist())


def tiny_backbone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> Backbone:
    """A tiny model as a backbone with the tokenizer above."""
    tokenizer = tokenizer or word_tokenizer()
    return Backbone("tiny", model, tokenizer, *start_token(tokenizer), tokenizer_hash(tokenizer))
