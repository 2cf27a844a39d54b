"""A word-level tokenizer and models small enough to check by hand."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from easyedit_wise.evaluation.asking import Query
from easyedit_wise.evaluation.final import FactRecord

SPECIAL = ["<unk>", "<eos>", "<pad>"]
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "is", "of", "the", "capital", "France", "Lyon", "Paris", "?"]


def word_tokenizer(pad: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word, numbered as in SPECIAL + WORDS; ``pad`` and ``eos`` say which tokens it names."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"unk_token": "<unk>"}
    if pad:
        named["pad_token"] = "<pad>"
    if eos:
        named["eos_token"] = "<eos>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def token(word: str) -> int:
    return (SPECIAL + WORDS).index(word)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama that never ends its text by itself."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return _built(LlamaForCausalLM, config, seed)


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2: its absolute positions show at once when padding shifts a row."""
    config = GPT2Config(
        vocab_size=len(SPECIAL) + len(WORDS),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return _built(GPT2LMHeadModel, config, seed)


def _built(kind, config, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).eval()


class NextWord(nn.Module):
    """Gives the logit ``height`` to the word that a table names after the last word, and 0 to all others.

    Its forward knows neither position_ids nor logits_to_keep, as that of a model from elsewhere.
    """

    def __init__(self, table: dict[str, str], height: float = 5.0) -> None:
        super().__init__()
        size = len(SPECIAL) + len(WORDS)
        logits = torch.zeros(size, size)
        for word, following in table.items():
            logits[token(word), token(following)] = height
        self.logits = nn.Parameter(logits)
        self.dropout = nn.Dropout(0.5)
        self.generation_config = SimpleNamespace(eos_token_id=token("<eos>"))

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.dropout(self.logits[input_ids]))

    def generate(self, input_ids, attention_mask, max_new_tokens, eos_token_id, pad_token_id, **settings):
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            following = self(input_ids, attention_mask).logits[:, -1].argmax(dim=-1)
            following[ended] = pad_token_id
            ended |= torch.isin(following, torch.tensor(eos_token_id))
            input_ids = torch.cat([input_ids, following.unsqueeze(-1)], dim=-1)
        return input_ids


def records() -> list[FactRecord]:
    """Two facts for NextWord; the first without a nearby query, the second without rephrasings."""
    return [
        FactRecord("a b", "c d", "a", ["x b", "y z"], Query("e", "f")),
        FactRecord("g h", "i", "g", [], Query("j", "k l"), Query("m", "n")),
    ]
