"""A vocabulary: the words that have a number of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__: list[str] = []

PAD, MARK = 0, 1


@dataclass(frozen=True)
class Vocabulary:
    """Words, and what comes before them: 0 pads, then marks of the workload's own (a mask, a boundary), then `unknown`.

    Attributes:
        numbers: of the words.
        unknown: the number of every other word.
    """

    numbers: Mapping[str, int]
    unknown: int

    @classmethod
    def of_most_frequent(cls, samples: Iterable[Sequence[str]], num_words: int, num_marks: int = 1) -> Vocabulary:
        """The most frequent words of the samples; of two equally frequent ones the alphabet decides."""
        counts = Counter(word for sample in samples for word in sample)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        unknown = MARK + num_marks
        return cls({word: number for number, word in enumerate(ranked[:num_words], start=unknown + 1)}, unknown)

    def __len__(self) -> int:
        return self.unknown + 1 + len(self.numbers)

    def encode(self, sample: Sequence[str]) -> list[int]:
        """The numbers of a sample's words."""
        return [self.numbers.get(word, self.unknown) for word in sample]
