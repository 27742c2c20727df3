"""Multi30k: pairs of sentences that describe one picture in two languages.

Source: Elliott, Frank, Sima'an and Specia 2016, "Multi30K: Multilingual English-German Image Descriptions", arXiv
1605.00459.
"""

from __future__ import annotations

from pathlib import Path

from gradfold.errors import DataError
from gradfold.workloads.text_files import read_lines

__all__: list[str] = []

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
