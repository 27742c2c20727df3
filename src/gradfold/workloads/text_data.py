"""Texts as words and as numbers: docstrings, WikiText and Multi30k; their vocabulary, and samples padded to a batch.

A file that is missing or damaged is a `DataError`.
"""

from __future__ import annotations

import ast
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gradfold.errors import DataError
from gradfold.workloads.data_files import find_file, read_file

PAD, MARK = 0, 1  # the first tokens of every vocabulary

DOCSTRINGS = f"docstrings of the standard library of Python {platform.python_version()}"

_WORD = re.compile(r"\w+|[^\w\s]")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_HEADING = re.compile(r" = .* = ")
_MULTI30K = "https://github.com/multi30k/dataset/tree/master/data/task1/raw"


@dataclass(frozen=True)
class Vocabulary:
    """The numbers of words, after those of padding, of the workload's own marks (mask, boundary) and of `unknown`."""

    numbers: Mapping[str, int]  # by word
    unknown: int  # the number of every other word

    @classmethod
    def of_most_frequent(cls, samples: Iterable[Sequence[str]], num_words: int, num_marks: int = 1) -> Vocabulary:
        """The most frequent words of the samples; equally frequent ones in alphabetical order."""
        counts = Counter(word for sample in samples for word in sample)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        unknown = MARK + num_marks
        return cls({word: number for number, word in enumerate(ranked[:num_words], start=unknown + 1)}, unknown)

    def __len__(self) -> int:
        return self.unknown + 1 + len(self.numbers)

    def encode(self, sample: Sequence[str]) -> list[int]:
        """The numbers of a sample's words."""
        return [self.numbers.get(word, self.unknown) for word in sample]


def pad(samples: Sequence[Tensor], value: int = PAD) -> Tensor:
    """The batch (B, T) of samples (T,), as long as the longest."""
    return pad_sequence(list(samples), batch_first=True, padding_value=value)


def pad_columns(samples: Sequence[Mapping[str, Tensor]], **values: int) -> dict[str, Tensor]:
    """The batch of samples with several columns, each as long as its longest; `values` pad in place of `PAD`."""
    return {name: pad([sample[name] for sample in samples], values.get(name, PAD)) for name in samples[0]}


def lengths(samples: Sequence[Tensor]) -> list[int]:
    """The number of tokens of each sample."""
    return [len(sample) for sample in samples]


def column_lengths(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, list[int]]:
    """The number of tokens of each sample, by column."""
    return {name: lengths([sample[name] for sample in samples]) for name in samples[0]}


def words_of(text: str) -> list[str]:
    """Words and single punctuation marks, in lower case.

    >>> words_of("It's  here.")
    ['it', "'", 's', 'here', '.']
    """
    return _WORD.findall(text.lower())


def read_docstrings(limit: int, folder: Path | None = None) -> list[list[str]]:
    """The words of the first `limit` different docstrings, in lower case.

    They are read from the sources in the order of their names, without importing a module, and differ a little between
    Python versions. `folder` has the sources, instead of this Python's standard library. Fewer than `limit`, as in a
    Python without its sources, are a `DataError`.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    texts: dict[str, None] = {}  # an ordered set: a text that occurs twice must not be both trained on and held out
    for path in sorted(folder.glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes(), filename=str(path)))
        docstrings = [ast.get_docstring(node) for node in nodes if isinstance(node, _DOCUMENTED)]
        texts.update(dict.fromkeys(filter(None, docstrings)))
        if len(texts) >= limit:
            return [words_of(text) for text in list(texts)[:limit]]
    raise DataError(f"{folder}: expected Python sources with {limit:,} different docstrings, found {len(texts):,}")


def read_paragraphs(folder: Path, names: Sequence[str]) -> list[list[str]]:
    """The words of every paragraph of a file of WikiText, without headings; `names` is what it may be called.

    Source: Merity, Xiong, Bradbury and Socher 2016, "Pointer Sentinel Mixture Models", arXiv 1609.07843.
    """
    lines = _read_lines(folder, names)
    paragraphs = [line.split() for line in lines if line.strip() and not _HEADING.fullmatch(line.rstrip() + " ")]
    if not paragraphs:
        raise DataError(f"{folder}: expected paragraphs of WikiText in {names[0]}, one per line, found none")
    return paragraphs


def read_pairs(folder: Path | None, part: str, languages: tuple[str, str]) -> list[tuple[str, str]]:
    """The sentence pairs of a part of Multi30k ("train", "val", ...) without those with a blank side.

    The folder holds `train.en.gz` and the like, gzipped or not. Source: Elliott, Frank, Sima'an and Specia 2016,
    "Multi30K: Multilingual English-German Image Descriptions", arXiv 1605.00459.
    """
    if folder is None:
        names = " and ".join(f"{part}.{language}.gz" for language in languages)
        raise DataError(
            f"this workload trains on Multi30k, which is not downloaded automatically. Download its files ({names} "
            f"among them) from {_MULTI30K} and name the folder that holds them: --data DIR"
        )
    first, second = (_read_lines(folder, (f"{part}.{language}.gz", f"{part}.{language}")) for language in languages)
    if len(first) != len(second):
        raise DataError(
            f"{folder}: expected {part}.{languages[0]} and {part}.{languages[1]} to have a line for each pair, found "
            f"{len(first):,} and {len(second):,} lines"
        )
    return [pair for pair in zip(first, second, strict=True) if all(map(str.strip, pair))]


def _read_lines(folder: Path, names: Sequence[str]) -> list[str]:
    """The lines of a text in UTF-8, without their ends."""
    path = find_file(folder, names)
    try:
        content = read_file(path, "text in UTF-8", must_be_gzipped=path.suffix == ".gz").decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged: expected text in UTF-8: {error}") from error
    # Not splitlines(): some sentences hold other characters that end lines elsewhere.
    return content.removesuffix("\n").split("\n")
