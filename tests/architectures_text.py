"""Text, audio and multimodal architectures from small configurations, and what they are made of: one table."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from architectures import Architecture, named, of

WORDS = 99
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERT = {"vocab_size": WORDS, **SMALL}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    **{"vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48},
    **{"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
}


def words(length: int = 7) -> dict[str, Tensor]:
    """Two sentences, the second one shorter."""
    ids = torch.randint(3, WORDS, (2, length))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pair() -> dict[str, Tensor]:
    """What an encoder reads, and what a decoder has written so far."""
    return {**words(), "decoder_input_ids": words(5)["input_ids"]}


def sound() -> dict[str, Tensor]:
    """A spectrogram, and what a decoder has written so far."""
    return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": words(5)["input_ids"]}


def captioned() -> dict[str, Tensor]:
    """Images with their captions."""
    return {**words(), "pixel_values": torch.randn(2, 3, 32, 32)}


class Only(nn.Module):
    """A network of several outputs that returns one of them: the others would make their channels outputs too."""

    def __init__(self, network: nn.Module, key: str) -> None:
        super().__init__()
        self.network, self.key = network, key

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
    ) -> Tensor:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "pixel_values": pixel_values,
            "input_features": input_features,
        }
        found: Tensor = self.network(**{k: v for k, v in given.items() if v is not None})[self.key]
        return found


def only(key: str, model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """What builds such a network."""
    return lambda: Only(named(model, config, **options), key)


def clip() -> nn.Module:
    text = {**SMALL, "vocab_size": WORDS, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    parts = {"text_config": text, "vision_config": vision, "projection_dim": 24}
    return Only(named("CLIPModel", "CLIPConfig", **parts), "logits_per_image")


LANGUAGE: dict[str, Architecture] = {
    "BERT": Architecture(of("BertForSequenceClassification", "BertConfig", **BERT), words, fast=True),
    "RoBERTa": Architecture(of("RobertaForMaskedLM", "RobertaConfig", max_position_embeddings=40, **BERT), words),
    "DistilBERT": Architecture(
        of(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=WORDS,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
        ),
        words,
    ),
    "ALBERT": Architecture(of("AlbertForSequenceClassification", "AlbertConfig", embedding_size=16, **BERT), words),
    "ELECTRA": Architecture(of("ElectraForSequenceClassification", "ElectraConfig", embedding_size=16, **BERT), words),
    "GPT-2": Architecture(
        of("GPT2LMHeadModel", "GPT2Config", vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=40),
        words,
        fast=True,
    ),
    "Llama": Architecture(of("LlamaForCausalLM", "LlamaConfig", **BERT), words, fast=True),
    "Mistral": Architecture(
        of("MistralForCausalLM", "MistralConfig", num_key_value_heads=2, sliding_window=4, **BERT), words
    ),
    "T5": Architecture(only("logits", "T5ForConditionalGeneration", "T5Config", **T5), pair, fast=True),
    "T5, gated": Architecture(
        only(
            "logits",
            "T5ForConditionalGeneration",
            "T5Config",
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            **T5,
        ),
        pair,
    ),
    "BART": Architecture(
        only("logits", "BartForConditionalGeneration", "BartConfig", max_position_embeddings=40, **BART), pair
    ),
    "Whisper": Architecture(
        only(
            "logits",
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=24,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            **BART,
        ),
        sound,
    ),
    "wav2vec2": Architecture(
        of(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            **(SMALL | {"vocab_size": 20, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}),
            conv_dim=(16, 16, 24),
            conv_stride=(5, 2, 2),
            conv_kernel=(10, 3, 3),
            num_feat_extract_layers=3,
        ),
        lambda: {"input_values": torch.randn(2, 800)},
    ),
    "CLIP": Architecture(clip, captioned),
}

# --- parts ------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Written by hand, as language models do."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class GatedMlp(nn.Module):
    """silu(gate) * up, and back."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.norm = RMSNorm(size)
        self.gate, self.up = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(silu(self.gate(h)) * self.up(h))


class FusedQkv(nn.Module):
    """One matrix for queries, keys and values, in three parts."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(b, n, -1))


class SplitQkv(nn.Module):
    """One matrix, split into blocks of heads by hand; the softmax by hand too."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads, self.each = heads, size // heads
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p.view(b, n, self.heads, self.each).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        a = (q @ k.transpose(-2, -1) / math.sqrt(self.each)).softmax(-1)
        return x + self.out((a @ v).transpose(1, 2).reshape(b, n, self.heads * self.each))


class GroupedQueries(nn.Module):
    """Fewer heads of keys and values than of queries, each repeated."""

    def __init__(self, size: int, heads: int, shared: int) -> None:
        super().__init__()
        self.heads, self.shared, self.each = heads, shared, size // heads
        self.q = nn.Linear(size, size)
        self.k, self.v = (nn.Linear(size, shared * self.each) for _ in range(2))
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.each).transpose(1, 2)
        k, v = (f(x).view(b, n, self.shared, self.each).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.shared, dim=1) for t in (k, v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(b, n, -1))


class EinsumAttention(nn.Module):
    """Attention in Einstein's notation."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads, self.each = heads, size // heads
        self.q, self.k, self.v, self.out = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, self.each) for f in (self.q, self.k, self.v))
        a = (torch.einsum("bihd,bjhd->bhij", q, k) * self.each**-0.5).softmax(-1)
        return x + self.out(torch.einsum("bhij,bjhd->bihd", a, v).reshape(b, n, -1))


class TorchAttention(nn.Module):
    """torch's own multi-head attention."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


class WeightNorm(nn.Module):
    """A weight that is computed: direction times length."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.randn(inner, size) / math.sqrt(size))
        self.length = nn.Parameter(torch.rand(inner, 1) + 0.5)
        self.bias = nn.Parameter(torch.zeros(inner))
        self.back = nn.Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.length * self.direction / self.direction.norm(dim=1, keepdim=True)
        return x + self.back(torch.relu(nn.functional.linear(x, weight, self.bias)))


class Recurrent(nn.Module):
    """An LSTM in both directions, and a GRU after it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(size, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(24, size, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gru(self.lstm(x)[0])[0]


class Text(nn.Module):
    """Embeddings, a block, and an output layer, which may be the embeddings again."""

    def __init__(self, *blocks: nn.Module, size: int = 24, tied: bool = False) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(WORDS, size), nn.Sequential(*blocks)
        self.before = nn.Linear(size, size)
        self.head = nn.Linear(size, WORDS, bias=not tied)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.before(self.blocks(self.words(input_ids))))
        return found


def text(*blocks: Callable[[], nn.Module], tied: bool = False) -> Architecture:
    """Such blocks between embeddings and an output layer."""
    return Architecture(lambda: Text(*(b() for b in blocks), tied=tied), lambda: {"input_ids": words()["input_ids"]})


PARTS: dict[str, Architecture] = {
    "tied embeddings": text(partial(FusedQkv, 24, 3), tied=True),
    "gated MLP": text(partial(GatedMlp, 24, 40)),
    "fused qkv": text(partial(FusedQkv, 24, 3)),
    "split qkv": text(partial(SplitQkv, 24, 3)),
    "grouped queries": text(partial(GroupedQueries, 24, 4, 2)),
    "attention in einsum": text(partial(EinsumAttention, 24, 3)),
    "torch's attention": text(partial(TorchAttention, 24, 3)),
    "computed weights": text(partial(WeightNorm, 24, 40)),
    "LSTM and GRU": text(partial(Recurrent, 24)),
}

TEXT: dict[str, Architecture] = LANGUAGE | PARTS
