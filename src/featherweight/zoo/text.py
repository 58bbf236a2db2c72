"""A recurrent network that classifies sentences: what large text networks are distilled into."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn


@final
class BiLstm(nn.Module):
    """Embedding, a long short-term memory in each direction, their last states, a ReLU layer, scores of classes.

    Sentences (batch, length) are padded behind; padding changes nothing. The network of Tang et al., 2019,
    arXiv:1903.12136, for one sentence.

    Args:
        words: how many numbers there are, `pad` among them.
        classes: how many are scored.
        width: of the embedding.
        hidden: states in each direction.
        inner: units of the ReLU layer.
        pad: the number that pads.
        dropout: of embedded words and of the ReLU layer.

    >>> BiLstm(50, 2)(torch.tensor([[4, 7, 0]])).shape
    torch.Size([1, 2])
    """

    def __init__(
        self,
        words: int,
        classes: int,
        *,
        width: int = 64,
        hidden: int = 64,
        inner: int = 64,
        pad: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pad = pad
        self.embedding = nn.Embedding(words, width)
        self.ahead = nn.LSTM(width, hidden, batch_first=True)
        self.back = nn.LSTM(width, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.inner = nn.Linear(2 * hidden, inner)
        self.relu = nn.ReLU()
        self.head = nn.Linear(inner, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores (batch, classes); `attention_mask` says the same as the padding, and is not looked at."""
        length = (input_ids != self.pad).sum(1).clamp_min(1)[:, None]
        place = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        turned = torch.where(place < length, length - 1 - place, place)  # each sentence backwards, padding in its place
        words = self.dropout(self.embedding(input_ids))
        mirrored = words.gather(1, turned[..., None].expand(-1, -1, words.shape[2]))
        last = (length - 1)[..., None]
        ends = [
            states.gather(1, last.expand(-1, -1, states.shape[2]))[:, 0]
            for states in (self.ahead(words)[0], self.back(mirrored)[0])
        ]
        return self.head(self.dropout(self.relu(self.inner(torch.cat(ends, 1)))))
