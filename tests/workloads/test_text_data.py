"""The text corpus: the docstrings of the standard library, as words and as numbers."""

import sys

import pytest

from gradfold.errors import DataError
from gradfold.workloads.text_data import Vocabulary, read_docstrings

SOURCE = '''"""A module, first."""

class Thing:
    """Said twice."""

    async def wait(self):
        """It's  WAITING
        for you."""

    def undocumented(self):
        return "not a docstring"

def f():
    """Said twice."""
'''


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "b.py").write_text(SOURCE)
    (tmp_path / "a.py").write_text('"""Before b."""')
    (tmp_path / "c.py").write_text('"""After b."""\ndef g():\n    """Said twice."""\n')
    (tmp_path / "notes.txt").write_text('"""Not Python."""')
    return tmp_path


def test_each_docstring_is_read_once_in_the_order_of_the_sources(sources):
    assert read_docstrings(5, sources) == [
        ["before", "b", "."],
        ["a", "module", ",", "first", "."],
        ["said", "twice", "."],
        ["it", "'", "s", "waiting", "for", "you", "."],
        ["after", "b", "."],
    ]
    assert len(read_docstrings(2, sources)) == 2


def test_too_few_docstrings_are_an_error_with_both_numbers(sources):
    with pytest.raises(DataError, match="with 6 different docstrings, found 5") as caught:
        read_docstrings(6, sources)
    assert str(sources) in str(caught.value)


def test_the_standard_library_is_read_without_importing_it():
    before = set(sys.modules)
    samples = read_docstrings(500)
    assert not {"antigravity", "this", "aifc", "asynchat", "bdb"} & (set(sys.modules) - before)
    lengths = [len(words) for words in samples]
    assert len(samples) == 500
    assert min(lengths) >= 1 and max(lengths) > 10 * sorted(lengths)[250]
    assert samples == read_docstrings(500)


def test_a_vocabulary_numbers_the_most_frequent_words():
    samples = [["b", "a", "d"], ["b", "a", "c"], ["b"]]
    vocabulary = Vocabulary.of_most_frequent(samples, num_words=3)
    assert vocabulary.encode(["b", "a", "c", "d", "e"]) == [3, 4, 5, 2, 2]
    assert len(vocabulary) == 6
    without_marks = Vocabulary.of_most_frequent(samples, num_words=2, num_marks=0)
    assert without_marks.encode(["b", "a", "c", "e"]) == [2, 3, 1, 1]
    assert len(without_marks) == 4
