"""Block sizes of the kernels, chosen by measurement (recipes/bench/retention_attention.py --sweep) on an H100."""

from typing import NamedTuple


class Tile(NamedTuple):
    """BM queries by BN keys at a time; `stages` of the loop are loaded ahead."""

    BM: int
    BN: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    forward: Tile
    backward_keys: Tile  # BN a multiple of BM
    backward_queries: Tile  # BM a multiple of BN, as in forward


# (larger head dim rounded up to a power of two, bytes per element) -> tiles
TABLE = {
    (64, 2): Tiles(Tile(128, 128, 4, 2), Tile(64, 64, 4, 3), Tile(128, 64, 4, 2)),
    (128, 2): Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)),
    (256, 2): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)),
    (64, 4): Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (128, 4): Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (256, 4): Tiles(Tile(32, 32, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
SMALLEST, LARGEST = 64, 256  # head dims with a row of their own; smaller ones take the first


def tiles_for(block_dim: int, element_size: int) -> Tiles:
    return TABLE[max(block_dim, SMALLEST), element_size]
