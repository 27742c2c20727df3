"""The words of pairs of sentences: Multi30k's captions in two languages, as numbers.

Source: Elliott, Frank, Sima'an and Specia 2016, "Multi30K: Multilingual English-German Image Descriptions", arXiv
1605.00459; https://github.com/multi30k/dataset, data/task1/raw.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from gradfold.errors import DataError

__all__: list[str] = []

PAD, UNKNOWN = 0, 1
_NUM_SPECIAL = 2
_SOURCE = "https://github.com/multi30k/dataset/tree/master/data/task1/raw"


def read_sentences(folder: Path | None, part: str, languages: Sequence[str]) -> dict[str, list[list[str]]]:
    """The words of every sentence of a part, in lower case, by language; line k says the same in all.

    Args:
        folder: holds `train.en.gz` and the like, gzipped or not.
        part: "train" or "test_2016_flickr".
        languages: "en" and "de".

    Raises:
        DataError: no folder is given, a file is missing or damaged, or the numbers of lines differ.
    """
    if folder is None:
        names = " and ".join(f"{part}.{language}.gz" for language in languages)
        raise DataError(
            f"this workload trains on Multi30k, which is not downloaded for you. Download its files ({names} among "
            f"them) from {_SOURCE} and name the folder that holds them: --data DIR"
        )
    sentences = {language: _read(folder, f"{part}.{language}") for language in languages}
    counts = {language: len(lines) for language, lines in sentences.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"{folder}: the files of {part!r} have different numbers of lines, and do not pair: {counts}")
    return sentences


def number_words(sentences: Sequence[Sequence[str]], num_words: int) -> dict[str, int]:
    """A number for each of the most frequent words, from 2 on; of two equally frequent ones the alphabet decides."""
    counts = Counter(word for sentence in sentences for word in sentence)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:num_words]
    return {word: number for number, word in enumerate(ranked, start=_NUM_SPECIAL)}


def encode(sentence: Sequence[str], numbers: Mapping[str, int], max_words: int) -> list[int]:
    """The numbers of a sentence's first words; at least one."""
    return [numbers.get(word, UNKNOWN) for word in sentence[:max_words]] or [UNKNOWN]


def _read(folder: Path, name: str) -> list[list[str]]:
    found = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if found is None:
        others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise DataError(
            f"{folder}: expected a file {name}.gz or {name}, found {', '.join(others[:5]) or 'nothing'}. The files "
            f"are those of {_SOURCE}"
        )
    try:
        content = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
        # Split at line feeds alone: sentences hold other characters that Python takes for ends of lines.
        lines = content.decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{found} is damaged: {error}") from error
    return [re.findall(r"\w+|[^\w\s]", line.lower()) for line in lines]
