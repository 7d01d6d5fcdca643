"""Where the programs of Triton kernels stand that take a tile of a triangle each."""

from sosd_fast.kernels import tl, triton

if triton is not None:

    @triton.jit
    def place(tile):
        """Row and column of a tile of a lower triangle: tile 0 is (0, 0), tiles 1 and 2 are (1, 0) and (1, 1), ..."""
        row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
        row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
        row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
        return row, tile - row * (row + 1) // 2
