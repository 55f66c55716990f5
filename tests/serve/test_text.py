"""Text of a stream: whole characters, nothing of a stop string. The prefix cache."""

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("library")


def pushed(stops, *pieces):
    from fasa_gguf.serve.text import TextStream

    stream = TextStream(stops)
    parts = [stream.push(piece) for piece in pieces]
    return parts, stream.end(), stream.stopped


@pytest.mark.parametrize(
    ("stops", "pieces", "parts", "end", "stopped"),
    [
        ((), [b"a", b"b"], ["a", "b"], "", False),
        ((), [b"\xe2", b"\x82", b"\xac!"], ["", "", "\u20ac!"], "", False),
        ((), [b"x\xe2\x82"], ["x"], "\ufffd", False),
        (("END",), [b"a EN", b"D b"], ["a ", ""], "", True),
        (("END",), [b"a EN", b"E"], ["a ", "EN"], "E", False),
        (("\u20ac",), [b"1\xe2", b"\x82\xac2"], ["1", ""], "", True),
        (("abab", "b"), [b"xa", b"b"], ["x", "a"], "", True),
        (("aab",), [b"a", b"a", b"a", b"b"], ["", "", "a", ""], "", True),
    ],
)
def test_pieces(stops, pieces, parts, end, stopped):
    assert pushed(stops, *pieces) == (parts, end, stopped)


def test_prefix_cache_keeps_what_was_used_last_within_its_limit():
    from fasa_gguf.serve.prefix import PrefixCache, common

    assert common([1, 2, 3], [1, 2, 4]) == 2 and common([], [1]) == 0 and common([1], [1, 2]) == 1
    size = 1000 + 4 * 3
    cache = PrefixCache(2 * size)
    assert cache.put([1, 2, 3], bytes(1000)) and cache.put([4, 5, 6], bytes(1000))
    found, n = cache.find([1, 2, 9], whole=False)
    assert n == 2 and found.tokens.tolist() == [1, 2, 3]
    assert cache.find([1, 2, 9], whole=True) == (None, 0)
    assert cache.put([7, 8, 9], bytes(1000))  # 4, 5, 6 was not used since
    assert len(cache) == 2 and cache.n_bytes == 2 * size and cache.evicted == 1
    assert cache.find([4, 5, 6], whole=False) == (None, 0) and cache.has([1, 2]) and not cache.has([1, 2, 3, 4])
    assert cache.put([1, 2, 3, 4], bytes(900)) and len(cache) == 2  # in the place of 1, 2, 3
    assert not cache.put([1], bytes(3000)) and len(cache) == 2
    assert PrefixCache(0).put([1], b"") is False


def test_top_tokens_are_the_most_likely_ties_to_the_lower():
    from fasa_gguf.serve.sampling import log_softmax, top_tokens

    logits = np.array([1.0, 3.0, 3.0, -1.0, 2.0], np.float32)
    assert top_tokens(log_softmax(logits), 3) == [1, 2, 4] and top_tokens(logits, 0) == []
    assert np.isclose(np.exp(log_softmax(logits)).sum(), 1)
