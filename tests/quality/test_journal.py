"""The file of --resume."""

import pytest

from fasa_gguf import FasaError
from fasa_gguf.quality.journal import Journal


def test_a_file_that_is_no_journal_is_left_alone(tmp_path):
    for content in (b"hello\n", b"hello", b'{"a": 1}\n', b"[1]\n", b"\xff\n"):
        path = tmp_path / "x"
        path.write_bytes(content)
        with pytest.raises(FasaError, match="x: not a file of --resume; give another name"):
            Journal(path, {})
        assert path.read_bytes() == content
    for start in (b"", b'{"settings": {"a'):  # nothing finished yet
        path.write_bytes(start)
        with Journal(path, {"a": [1, (2, 3)]}) as j:
            j.add("k", {"v": 1})
        assert Journal(path, {"a": [1, [2, 3]]}).get("k") == {"v": 1}
    with Journal(None, {}) as j:
        j.add("k", 1)
        assert j.get("k") == 1 and j.get("other") is None
