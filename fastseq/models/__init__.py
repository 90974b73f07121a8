"""The models of the field, from the recurrent network to the Transformer, made of fastseq's modules: to read, to copy
and to start from.

All are batch_first: tokens are [B, T] int64, and where rows end is told by lengths [B], not by a token.
"""

from fastseq.models.cnn import ImageClassifier, TextCNN
from fastseq.models.recurrent import RecurrentEncoder, RecurrentLM, SequenceClassifier, SequenceTagger
from fastseq.models.seq2seq import Seq2Seq, Seq2SeqState
from fastseq.models.transformer import TransformerClassifier, TransformerLM, TransformerSeq2Seq, TransformerState

__all__ = [
    "ImageClassifier",
    "RecurrentEncoder",
    "RecurrentLM",
    "Seq2Seq",
    "Seq2SeqState",
    "SequenceClassifier",
    "SequenceTagger",
    "TextCNN",
    "TransformerClassifier",
    "TransformerLM",
    "TransformerSeq2Seq",
    "TransformerState",
]
