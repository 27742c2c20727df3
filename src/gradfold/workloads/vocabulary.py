"""A vocabulary: the words that have a number of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__: list[str] = []

PAD, MARK, UNKNOWN = 0, 1, 2
_NUM_SPECIAL = 3


@dataclass(frozen=True)
class Vocabulary:
    """Words from 3 on; 0 pads, 1 is a mark of the workload's own (a mask, a boundary), 2 is every other word."""

    numbers: Mapping[str, int]

    @classmethod
    def of_most_frequent(cls, samples: Iterable[Sequence[str]], num_words: int) -> Vocabulary:
        """The most frequent words of the samples; of two equally frequent ones the alphabet decides."""
        counts = Counter(word for sample in samples for word in sample)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls({word: number for number, word in enumerate(ranked[:num_words], start=_NUM_SPECIAL)})

    def __len__(self) -> int:
        return _NUM_SPECIAL + len(self.numbers)

    def encode(self, sample: Sequence[str]) -> list[int]:
        """The numbers of a sample's words."""
        return [self.numbers.get(word, UNKNOWN) for word in sample]
