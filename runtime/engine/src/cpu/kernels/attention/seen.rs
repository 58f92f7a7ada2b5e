//! Which keys each query sees, for kernels whose scores stand with a key in a row and sixteen queries side by side.

use std::arch::x86_64::*;
use std::ops::Range;

/// Of each query the first key it sees, and the one behind the last: two arrays of a scratch.
#[derive(Clone, Copy)]
pub(super) struct Seen {
    pub from: *mut i32,
    pub to: *mut i32,
}

/// The same of sixteen queries.
#[derive(Clone, Copy)]
pub(super) struct Sixteen {
    from: __m512i,
    to: __m512i,
}

impl Seen {
    /// Sets what query `i` sees.
    ///
    /// # Safety
    /// The scratch has a place for it.
    pub unsafe fn set(&self, i: usize, keys: Range<usize>) {
        // SAFETY: by the contract.
        unsafe { (*self.from.add(i), *self.to.add(i)) = (keys.start as i32, keys.end as i32) };
    }

    /// What the sixteen queries from `i` on see.
    ///
    /// # Safety
    /// They have been set.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub unsafe fn sixteen(&self, i: usize) -> Sixteen {
        // SAFETY: by the contract.
        let [from, to] = unsafe { [self.from, self.to].map(|at| _mm512_loadu_si512(at.add(i).cast())) };
        Sixteen { from, to }
    }

    /// Whether one of the 32 queries from `i` on sees one of `keys`.
    ///
    /// # Safety
    /// They have been set.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub unsafe fn any_of_32(&self, i: usize, keys: Range<usize>) -> bool {
        let (first, end) = (_mm512_set1_epi32(keys.start as i32), _mm512_set1_epi32(keys.end as i32));
        // SAFETY: by the contract.
        [i, i + 16]
            .into_iter()
            .map(|i| unsafe { self.sixteen(i) })
            .any(|some| _mm512_cmplt_epi32_mask(some.from, end) & _mm512_cmplt_epi32_mask(first, some.to) != 0)
    }
}

impl Sixteen {
    /// Whether all of them see all of `keys`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub fn all(self, keys: Range<usize>) -> bool {
        let (first, end) = (_mm512_set1_epi32(keys.start as i32), _mm512_set1_epi32(keys.end as i32));
        _mm512_cmple_epi32_mask(self.from, first) & _mm512_cmple_epi32_mask(end, self.to) == u16::MAX
    }

    /// Those that see `key`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub fn of(self, key: usize) -> __mmask16 {
        let key = _mm512_set1_epi32(key as i32);
        _mm512_cmple_epi32_mask(self.from, key) & _mm512_cmplt_epi32_mask(key, self.to)
    }
}
