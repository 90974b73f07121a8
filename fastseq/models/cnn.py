"""Convolutional models: of images, and of sentences."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq.nn
from fastseq.models.inputs import check_lengths, check_tokens
from fastseq.nn.places import padding_mask


class ImageClassifier(nn.Module):
    """One label for an image (after LeCun et al. 1998, with ReLU and dropout as in Krizhevsky et al. 2012):

        x = max_pool_2x2(relu(conv_3x3(x)))                  for each number of channels
        logits = W_2 dropout(relu(W_1 x + b_1)) + b_2

    Convolution, ReLU and pooling are one op.

    Args:
        classes: how many.
        image: C, H and W of an image.
        channels: those of each convolution; each halves height and width.
        hidden: the features between W_1 and W_2.
        dropout: of these.

    Raises:
        ValueError: an image is too small for so many convolutions.
    """

    def __init__(
        self,
        classes: int,
        image: tuple[int, int, int] = (1, 28, 28),
        channels: tuple[int, ...] = (32, 64),
        hidden: int = 128,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        C, H, W = self.image = tuple(image)
        sizes = (C, *channels)
        H, W = H >> len(channels), W >> len(channels)
        if H < 1 or W < 1:
            raise ValueError(
                f"image must not be smaller than {2 ** len(channels)} for channels={channels}, got {image}"
            )
        self.convolutions = nn.Sequential(
            *(
                fastseq.nn.ConvReLUPool2d(before, after, kernel_size=3, padding=1, pool_size=2)
                for before, after in zip(sizes, channels, strict=False)
            )
        )
        self.hidden = fastseq.nn.Linear(sizes[-1] * H * W, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = fastseq.nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W].

        Raises:
            TypeError, ValueError: images are no such tensor.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor, got {type(images).__name__}")
        if images.dim() != 4 or images.shape[1:] != self.image:
            raise ValueError(f"images must be [B, {', '.join(map(str, self.image))}], got {list(images.shape)}")
        x = self.convolutions(images)  # [B, channels, H / 2^n, W / 2^n]
        return self.output(self.dropout(self.hidden(x.flatten(1)).relu()))


class TextCNN(nn.Module):
    """One label for a sentence (Kim 2014, arXiv:1408.5882): each filter looks for its pattern of w words wherever it
    may be.

        c_t = relu(W . [x_t; ...; x_{t+w-1}] + b)            of each filter, for widths w side by side
        p = max_t c_t                                        over the windows within the sentence
        logits = W_o dropout(p) + b_o

    A sentence shorter than a window is as one with zeros behind it.

    Args:
        vocabulary: how many tokens there are.
        classes: C
        embedding: E, the features of an embedding.
        filters: how many of each width.
        widths: of the windows, in tokens.
        dropout: of what is pooled.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        embedding: int = 128,
        filters: int = 100,
        widths: tuple[int, ...] = (3, 4, 5),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.convolutions = nn.ModuleList(nn.Conv1d(embedding, filters, width) for width in widths)
        self.dropout = nn.Dropout(dropout)
        self.output = fastseq.nn.Linear(filters * len(widths), classes)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, C] of tokens [B, T] int64; lengths [B], by default all T.

        Raises:
            TypeError, ValueError, IndexError: tokens or lengths are none of these.
        """
        check_tokens("tokens", tokens, self.embedding.num_embeddings)
        lengths = check_lengths("lengths", lengths, *tokens.shape)
        x = self.embedding(tokens)  # [B, T, E]
        if lengths is not None:
            x = x.masked_fill(padding_mask(lengths, x.shape[1], x.device).unsqueeze(2), 0)
        x = x.transpose(1, 2)  # [B, E, T]
        return self.output(self.dropout(torch.cat([self._pooled(conv, x, lengths) for conv in self.convolutions], 1)))

    def _pooled(self, convolution: Any, x: Tensor, lengths: Tensor | None) -> Tensor:
        """The most that each filter finds, [B, filters]."""
        (width,) = convolution.kernel_size
        found = convolution(F.pad(x, (0, max(0, width - x.shape[2])))).relu()  # [B, filters, windows]
        if lengths is not None:
            windows = (lengths - width + 1).clamp(min=1)
            # 0 is what relu gives where nothing is found.
            found = found.masked_fill(padding_mask(windows, found.shape[2], x.device).unsqueeze(1), 0)
        return found.amax(2)
