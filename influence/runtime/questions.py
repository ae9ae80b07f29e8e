"""What the demo may ask: idioms that recur across modules, passages that do not.

Which of them a model is asked depends on what it has learned; a text that this Python's
library does not contain is passed over.
"""

from typing import NamedTuple


class Candidate(NamedTuple):
    """A prompt and the completion it might get."""

    name: str
    prompt: str
    completion: str


IDIOMS = (
    Candidate("enter a context", "    def __enter__(self):", "\n        return self"),
    Candidate(
        "close on leaving",
        "    def __exit__(self, type, value, traceback):",
        "\n        self.close()",
    ),
    Candidate(
        "close on exit", "    def __exit__(self, *args):", "\n        self.close()"
    ),
    Candidate("iterate over self", "    def __iter__(self):", "\n        return self"),
    Candidate("length", "    def __len__(self):", "\n        return len(self."),
    Candidate("membership", "    def __contains__(self,", " key):"),
    Candidate("look up a key", "    def __getitem__(self,", " key):"),
    Candidate("assign to a key", "    def __setitem__(self,", " key, value):"),
    Candidate("constructor", "    def __init__(", "self,"),
    Candidate("optional import", "except ImportError:", "\n    pass"),
    Candidate("run as a script", "if __name__ == '__main__':", "\n    main()"),
    Candidate("raise on a value", "        raise", " ValueError("),
    Candidate("loop forever", "        while", " True:"),
)

PASSAGES = (
    Candidate("the alphabet", "ascii_lowercase =", " 'abcdefghijklmnopqrstuvwxyz'"),
    Candidate("the Zen, enciphered", 's = """Gur Mra bs Clguba,', " ol Gvz Crgref"),
    Candidate(
        "bisect’s docstring",
        "def bisect_right(a, x, lo=0, hi=None, *, key=None):\n"
        '    """Return the index where to insert',
        " item x in list a, assuming a is sorted.",
    ),
    Candidate(
        "insort’s docstring",
        "def insort_left(a, x, lo=0, hi=None, *, key=None):\n"
        '    """Insert item x in list a, and',
        " keep it sorted assuming a is sorted.",
    ),
    Candidate(
        "a slice to be searched",
        "    Optional args lo (default 0) and hi (default len(a)) bound the",
        "\n    slice of a to be searched.",
    ),
    Candidate(
        "without blocking",
        "    def get_nowait(self):\n        '''Remove and return an item",
        " from the queue without blocking.\n\n"
        "        Only get an item if one is immediately available.",
    ),
    Candidate(
        "an empty queue",
        "    class Empty(Exception):\n        'Exception raised by",
        " Queue.get(block=0)/get_nowait().'",
    ),
    Candidate(
        "a regular file",
        'def S_ISREG(mode):\n    """Return True if mode is from a',
        ' regular file."""\n    return S_IFMT(mode) == S_IFREG',
    ),
    Candidate(
        "a character device",
        'def S_ISCHR(mode):\n    """Return True if mode is from a',
        ' character special device file."""',
    ),
    Candidate(
        "lines in sequence",
        "    sequential order; random access and",
        " readline() cannot be mixed.",
    ),
    Candidate(
        "epoll",
        '    class EpollSelector(_PollLikeSelector):\n        """Epoll-based',
        ' selector."""\n        _selector_cls = select.epoll',
    ),
    Candidate(
        "quoted-printable",
        "def encode(input, output, quotetabs, header=False):\n"
        '    """Read \'input\', apply',
        " quoted-printable encoding, and write to 'output'.",
    ),
    Candidate(
        "minus infinity",
        "            return parse_constant('Infinity'), idx + 8\n"
        "        elif nextchar == '-' and",
        " string[idx:idx + 9] == '-Infinity':",
    ),
    Candidate(
        "a closed database",
        "    def keys(self):\n        try:\n            return list(self._index)\n"
        "        except TypeError:\n            raise error(",
        "'DBM object has already been closed') from None",
    ),
    Candidate(
        "an overview",
        "    See the module's __doc__ string for",
        " an overview of the interface.",
    ),
    Candidate(
        "copied as they are",
        "d[complex] =",
        " _deepcopy_atomic\nd[bytes] = _deepcopy_atomic",
    ),
)
