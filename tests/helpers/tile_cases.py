"""Arrays of struct fasa_tile_case: tiles, and which cells their queries see."""

import numpy as np

from fasa_gguf import reference_prefill as P

HOWS = ("plain", "two", "shared", "holes", "late", "twice", "ahead")


def make_tiles(pos, seq, stream, size):
    """int32 [n_tile, 2 + 2*size] of struct fasa_tile_case, and the lowest position of each tile."""
    numbers = P.tile_numbers(pos, seq, size)
    tiles = np.zeros((numbers.max() + 1, 2 + 2 * size), np.int32)
    for i in range(len(tiles)):
        tokens = np.flatnonzero(numbers == i)
        n = len(tokens)
        tiles[i, :2] = stream[tokens[0]], n
        tiles[i, 2 : 2 + n], tiles[i, 2 + size : 2 + size + n] = tokens, pos[tokens]
    return tiles, [pos[numbers == i].min() for i in range(len(tiles))]


def ubatch_tiles(cell_pos, of, own, seq, n_stream, size, sink, band):
    """Tiles and what they always attend, int32 [n_tile, sink + band + size] (-1: none), of a ubatch whose streams are
    alike; cell_pos, of, own, seq: as cells gives them."""
    pos, n = cell_pos[own], len(own)
    stream = np.repeat(np.arange(n_stream), n)
    tiles, first = make_tiles(np.tile(pos, n_stream), np.tile(seq, n_stream) + 2 * stream, stream, size)
    forced = np.full((len(tiles), sink + band + size), -1, np.int32)
    for i, tile in enumerate(tiles):
        mine = np.zeros(len(cell_pos), bool)
        mine[own[tokens_of(tile) % n]] = True
        found = np.flatnonzero(P.tile_forced(cell_pos, mine, first[i], of[seq[tile[2] % n]], sink, band))
        forced[i, : len(found)] = found
    return tiles, forced


def tokens_of(tile):
    return tile[2 : 2 + tile[1]]


def cells(how, n_before, n_tokens, n_empty, rng):
    """Of one stream: positions int [n_kv] (-1: empty), bool [2, n_kv] whether a cell is of a sequence, the cells of the
    ubatch's tokens, in order, and the tokens' sequences.

    two: sequences alternate; shared: the first third is of both; holes: cells are missing, and the ubatch fills some;
    late: positions begin at 5000; twice: every position has two cells; ahead: cells hold positions behind the ubatch's.
    """
    n_kv = n_before + n_tokens + n_empty
    at, used = np.arange(n_kv), np.arange(n_kv) < n_before + n_tokens
    new = np.arange(n_before, n_before + n_tokens)
    pos, of = at.copy(), np.stack([used, np.zeros(n_kv, bool)])
    if how in ("two", "shared"):
        pos, of = at // 2, np.stack([used & (at % 2 == 0), used & (at % 2 == 1)])
    if how == "shared":
        of[:, : n_before // 3] = True
        pos[: n_before // 3] = at[: n_before // 3] // 2
        of[1, new[::5]] = True  # and some of the ubatch's
    if how == "holes":
        gone = rng.permutation(n_before)[: n_before // 5]
        of[:, gone] = False
        new = np.sort(np.concatenate([rng.permutation(gone)[: len(gone) // 2], new]))[-n_tokens:]
        of[0] &= ~np.isin(at, new)
        pos[of[0]] = np.arange(of[0].sum())
        pos[new] = of[0].sum() + np.arange(n_tokens)
        of[0, new] = True
    if how == "late":
        pos += 5000
    if how == "twice":
        pos //= 2
    if how == "ahead":  # as when positions are decoded anew, without removing what is behind them
        pos[: n_before // 2] = rng.integers(n_before, n_before + 2 * n_tokens, n_before // 2)
    pos[~of.any(0)] = -1
    return pos, of, new, np.where(of[0, new], 0, 1)
