"""Text files of a data set: their lines, from a folder that the user names, gzipped or not.

The words of a text that nobody has cut into words before.

The docstrings of the Python standard library: text of uneven length that every Python brings along.

The text is read from the sources, and no module is imported for it. It differs a little from one Python version to
the next.

Multi30k: pairs of sentences that describe one picture in two languages.

Source: Elliott, Frank, Sima'an and Specia 2016, "Multi30K: Multilingual English-German Image Descriptions", arXiv
1605.00459.

A vocabulary: the words that have a number of their own.

WikiText: paragraphs of Wikipedia's good articles, as words with spaces between.

Source: Merity, Xiong, Bradbury and Socher 2016, "Pointer Sentinel Mixture Models", arXiv 1609.07843.
"""

from __future__ import annotations

import ast
import gzip
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradfold.errors import DataError

__all__: list[str] = []

_WORD = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Words and single punctuation marks, in lower case.

    >>> words_of("It's  here.")
    ['it', "'", 's', 'here', '.']
    """
    return _WORD.findall(text.lower())


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def read_docstrings(limit: int, folder: Path | None = None) -> list[list[str]]:
    """The words of the first `limit` different docstrings, in lower case.

    Args:
        limit: how many; the sources are read in the order of their names until there are enough.
        folder: where the sources are, instead of this Python's standard library.

    Raises:
        DataError: the folder does not have that many, as in a Python without its sources.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    texts: dict[str, None] = {}  # an ordered set: a text that occurs twice must not be both trained on and held out
    for path in sorted(folder.glob("*.py")):
        texts.update(dict.fromkeys(_docstrings_of(path)))
        if len(texts) >= limit:
            return [words_of(text) for text in list(texts)[:limit]]
    raise DataError(f"{folder}: expected Python sources with {limit:,} different docstrings, found {len(texts):,}")


def _docstrings_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))):
        if isinstance(node, _DOCUMENTED):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def read_lines(folder: Path, names: Sequence[str]) -> list[str]:
    """The lines of a text in UTF-8, without their ends.

    Args:
        folder: holds the file.
        names: what it may be called, the most likely first; one that ends in ".gz" is gzipped.

    Raises:
        DataError: there is no such folder, no such file in it, or it is damaged.
    """
    path = _one_of(folder, names)
    # Not splitlines(): some sentences hold other characters that end lines elsewhere.
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} is damaged: expected text in UTF-8{', gzipped' * (path.suffix == '.gz')}: {error}"
        ) from error


def has_one_of(folder: Path, names: Sequence[str]) -> bool:
    """Whether the folder holds a file of one of these names."""
    return any((folder / name).is_file() for name in names)


def _one_of(folder: Path, names: Sequence[str]) -> Path:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"{folder}: expected a folder with data files, found {found}")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    content = sorted(path.name for path in folder.iterdir())
    raise DataError(
        f"{folder}: expected a file {' or '.join(names)}, found {', '.join(content[:5]) or 'an empty folder'}"
    )


_SOURCE = "https://github.com/multi30k/dataset/tree/master/data/task1/raw"


def read_pairs(folder: Path | None, part: str, languages: tuple[str, str]) -> list[tuple[str, str]]:
    """The pairs of a part, of which line k says the same in both languages. Pairs with a blank side are left out.

    Args:
        folder: holds `train.en.gz` and the like, gzipped or not.
        part: "train", "val" or "test_2016_flickr".
        languages: "en" and "de", in this order or the other.

    Raises:
        DataError: no folder is given, a file is missing or damaged, or the two have different numbers of lines.
    """
    if folder is None:
        names = " and ".join(f"{part}.{language}.gz" for language in languages)
        raise DataError(
            f"this workload trains on Multi30k, which is not downloaded for you. Download its files ({names} among "
            f"them) from {_SOURCE} and name the folder that holds them: --data DIR"
        )
    first, second = (read_lines(folder, (f"{part}.{language}.gz", f"{part}.{language}")) for language in languages)
    if len(first) != len(second):
        raise DataError(
            f"{folder}: expected {part}.{languages[0]} and {part}.{languages[1]} to have a line for each pair, found "
            f"{len(first):,} and {len(second):,} lines"
        )
    return [pair for pair in zip(first, second, strict=True) if all(map(str.strip, pair))]


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


_HEADING = re.compile(r" = .* = ")


def read_paragraphs(folder: Path, names: Sequence[str]) -> list[list[str]]:
    """The words of every paragraph of a file, without headings.

    Args:
        folder: holds the file.
        names: what it may be called, the most likely first.

    Raises:
        DataError: the file is missing, damaged, or holds no paragraph.
    """
    lines = read_lines(folder, names)
    paragraphs = [line.split() for line in lines if line.strip() and not _HEADING.fullmatch(line.rstrip() + " ")]
    if not paragraphs:
        raise DataError(f"{folder} is foreign: expected paragraphs of WikiText in {names[0]}, one a line, found none")
    return paragraphs
