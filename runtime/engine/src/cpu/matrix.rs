//! A value of the tape as the threads of a team see it: rows in the arena, reached by raw pointer because several
//! threads write disjoint parts of one matrix at once.

use std::ops::Range;

use super::kernels::linear::OutMut;

/// `[rows, width]` of f32, rows contiguous.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    base: *mut f32,
    pub rows: usize,
    pub width: usize,
}

impl Matrix {
    /// # Safety
    /// `base` must point to `rows · width` floats that outlive every use of the matrix.
    pub unsafe fn new(base: *mut f32, rows: usize, width: usize) -> Matrix {
        Matrix { base, rows, width }
    }

    /// Address of a row's first element.
    pub fn row_ptr(&self, row: usize) -> *mut f32 {
        debug_assert!(row <= self.rows);
        // SAFETY: within the allocation, or one past it, by the contract of `new`.
        unsafe { self.base.add(row * self.width) }
    }

    /// A row.
    ///
    /// # Safety
    /// No thread may be writing to it.
    pub unsafe fn row<'a>(&self, row: usize) -> &'a [f32] {
        debug_assert!(row < self.rows);
        // SAFETY: in bounds by the contract of `new`; not written to by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.row_ptr(row), self.width) }
    }

    /// Several whole rows.
    ///
    /// # Safety
    /// No thread may be writing to them.
    pub unsafe fn all<'a>(&self, rows: Range<usize>) -> &'a [f32] {
        debug_assert!(rows.end <= self.rows);
        // SAFETY: as in `row`.
        unsafe { std::slice::from_raw_parts(self.row_ptr(rows.start), rows.len() * self.width) }
    }

    /// Columns `columns` of a row, to be written by this thread alone.
    ///
    /// # Safety
    /// No other thread may use these elements meanwhile.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn columns_mut<'a>(&self, row: usize, columns: Range<usize>) -> &'a mut [f32] {
        debug_assert!(row < self.rows && columns.end <= self.width);
        // SAFETY: in bounds by the contract of `new`; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.row_ptr(row).add(columns.start), columns.len()) }
    }

    /// The matrix as the output of a product.
    pub fn out(&self) -> OutMut {
        // SAFETY: as long as it says, by the contract of `new`; callers of `columns_mut` and of kernels alike divide the
        // elements among the threads.
        unsafe { OutMut::new(self.base, self.width, self.rows * self.width) }
    }

    /// Copies columns of a row from `source`, an op's input, unless the op works in place and they are there already.
    ///
    /// # Safety
    /// As [`Matrix::columns_mut`]; no thread may be writing to them in `source`.
    pub unsafe fn begin_from(&self, source: &Matrix, row: usize, columns: Range<usize>) {
        if source.base != self.base {
            // SAFETY: passed on; two values apart do not overlap.
            unsafe { self.columns_mut(row, columns.clone()).copy_from_slice(&source.row(row)[columns]) };
        }
    }

    /// A row, to be written by this thread alone.
    ///
    /// # Safety
    /// As [`Matrix::columns_mut`].
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row_mut<'a>(&self, row: usize) -> &'a mut [f32] {
        // SAFETY: passed on.
        unsafe { self.columns_mut(row, 0..self.width) }
    }
}
