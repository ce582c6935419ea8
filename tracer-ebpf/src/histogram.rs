//! The log-linear histogram that the kernel updates and user space reads.
//!
//! Values below [`LINEAR`] have a cell each; above, every power of two is divided into
//! [`SUB_CELLS`] cells, so a cell is at most 1/64 (1.6 %) of its values wide. Each cell lies
//! wholly inside one `HdrHistogram` bucket scheme of two significant digits, so merging loses nothing.

/// log2 of the cells per power of two.
pub const SUB_BITS: u32 = 6;
/// Cells per power of two.
pub const SUB_CELLS: usize = 1 << SUB_BITS;
/// Cells of the values that are counted exactly.
const LINEAR_CELLS: usize = 2 * SUB_CELLS;
/// Values below this are counted exactly.
pub const LINEAR: u64 = LINEAR_CELLS as u64;
/// The highest power of two that is told apart: 2^34 ns is 17 s.
pub const MAX_BIT: u32 = 33;
/// Cells of one histogram.
pub const CELLS: usize = LINEAR_CELLS + (MAX_BIT - SUB_BITS) as usize * SUB_CELLS;

/// The cell a value falls into; values above the range fall into the last one.
#[inline(always)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::inline_always,
    reason = "bounded by CELLS; the kernel programs must not call it"
)]
pub const fn cell_of(value: u64) -> usize {
    if value < LINEAR {
        return value as usize;
    }
    if value >> (MAX_BIT + 1) != 0 {
        return CELLS - 1;
    }
    let msb = highest_bit(value);
    let shift = msb - SUB_BITS;
    // (value >> shift) is in SUB_CELLS..2*SUB_CELLS
    (shift as usize) * SUB_CELLS + (value >> shift) as usize
}

/// The position of the highest set bit of a value below 2^64 that is not 0.
///
/// BPF has no such instruction and LLVM's replacement counts all bits; five comparisons do.
#[inline(always)]
#[allow(clippy::inline_always, reason = "the kernel programs must not call it")]
const fn highest_bit(mut value: u64) -> u32 {
    let mut bit = 0;
    if value >> 32 != 0 {
        value >>= 32;
        bit += 32;
    }
    if value >> 16 != 0 {
        value >>= 16;
        bit += 16;
    }
    if value >> 8 != 0 {
        value >>= 8;
        bit += 8;
    }
    if value >> 4 != 0 {
        value >>= 4;
        bit += 4;
    }
    if value >> 2 != 0 {
        value >>= 2;
        bit += 2;
    }
    if value >> 1 != 0 {
        bit += 1;
    }
    bit
}

/// The lowest and highest value of a cell.
pub const fn bounds_of(cell: usize) -> (u64, u64) {
    if cell < LINEAR_CELLS {
        return (cell as u64, cell as u64);
    }
    let shift = cell / SUB_CELLS - 1;
    let mantissa = (cell % SUB_CELLS + SUB_CELLS) as u64;
    let low = mantissa << shift;
    (low, low + (1 << shift) - 1)
}

/// One histogram as it lies in the per-CPU map.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Histogram {
    /// Sum of the recorded values, for an exact mean.
    pub sum: u64,
    /// Count of values of each cell.
    pub cells: [u64; CELLS],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_tile_the_range() {
        let mut next = 0;
        for cell in 0..CELLS {
            let (low, high) = bounds_of(cell);
            assert_eq!(low, next, "cell {cell}");
            assert_eq!(cell_of(low), cell);
            assert_eq!(cell_of(high), cell);
            next = high + 1;
        }
        assert_eq!(next, 1 << (MAX_BIT + 1));
        assert_eq!(cell_of(u64::MAX), CELLS - 1);
    }

    #[test]
    fn highest_bit_is_the_logarithm() {
        for bit in 0..64 {
            assert_eq!(highest_bit(1 << bit), bit);
            assert_eq!(highest_bit((1 << bit) | 1), bit);
            assert_eq!(highest_bit(u64::MAX >> (63 - bit)), bit);
        }
    }

    #[test]
    fn relative_error_is_bounded() {
        for cell in LINEAR_CELLS..CELLS {
            let (low, high) = bounds_of(cell);
            assert!((high - low + 1) as f64 / low as f64 <= 1.0 / 64.0 + 1e-12);
        }
    }
}
