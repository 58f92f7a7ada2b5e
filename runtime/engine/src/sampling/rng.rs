//! The generator that draws tokens: xoshiro256++ (Blackman and Vigna 2019, arXiv:1805.01407), seeded by SplitMix64 as
//! its authors advise. Written out so that a seed means the same sequence in every version of every platform.

/// A seeded stream of random numbers.
#[derive(Clone, Debug)]
pub(super) struct Rng([u64; 4]);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        let mut state = seed;
        Rng(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        }))
    }

    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let out = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        out
    }

    /// Uniform in [0, 1), all 53 bits.
    #[cfg(test)]
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 * (0.5f64).powi(53)
    }
}

/// A seed that differs from call to call, from the operating system's randomness behind the hash maps.
pub(super) fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference C code of xoshiro256++ on the state 1, 2, 3, 4 begins with these.
    #[test]
    fn follows_the_reference_sequence() {
        let mut rng = Rng([1, 2, 3, 4]);
        let got: Vec<u64> = (0..5).map(|_| rng.next()).collect();
        assert_eq!(got, [41943041, 58720359, 3588806011781223, 3591011842654386, 9228616714210784205]);
        // SplitMix64 from 1234567.
        assert_eq!(Rng::new(1234567).0[..2], [6457827717110365317, 3203168211198807973]);
    }

    #[test]
    fn is_uniform() {
        let mut rng = Rng::new(1);
        let mean = (0..100_000).map(|_| rng.uniform()).sum::<f64>() / 1e5;
        assert!((mean - 0.5).abs() < 4.0 * (1.0f64 / 12.0 / 1e5).sqrt());
        assert_ne!(fresh_seed(), fresh_seed());
    }
}
