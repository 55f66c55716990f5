"""Amounts of memory as people write them."""

import pytest

from fasa_gguf import FasaError
from fasa_gguf.memory.host import GIB, MIB, parse_size


def test_amounts_of_memory():
    assert [parse_size(x) for x in ("12G", "900M", "0.5 GiB", "1t", "64kb")] == [
        12 * GIB,
        900 * MIB,
        GIB // 2,
        1 << 40,
        65536,
    ]
    for bad in ("12", "G", "-1G", "many", "infG", "nanG"):
        with pytest.raises(FasaError, match="expected an amount of memory such as 12G or 900M"):
            parse_size(bad)
