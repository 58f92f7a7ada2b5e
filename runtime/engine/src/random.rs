//! Chance without state: number `i` of stream `seed` is a hash of the two.
//!
//! The generator is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), whose
//! state after `i` steps is `seed + i · 0x9E3779B97F4A7C15`: any number of a stream can be computed by itself, by any
//! thread, again and again. What is random in training (first values, order of the data, dropout) is thus a function of
//! the seed and of counters that a checkpoint holds anyway. Streams are told apart by hashing a name into their seed
//! ([`stream`]).

/// The distance between two states of SplitMix64.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// Number `index` (from 0) of the stream `seed`: the SplitMix64 output for the state `seed + (index + 1) · γ`.
pub fn splitmix64(seed: u64, index: u64) -> u64 {
    let z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(GAMMA));
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The 64-bit FNV-1a hash.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

/// The stream called `name` of a run with this seed.
pub fn stream(name: &str, seed: u64) -> u64 {
    fnv1a(name.as_bytes()) ^ seed
}

/// Number `index` of stream `seed`, uniform in [0, 1): the upper 24 bits, exact in an `f32`.
pub fn uniform(seed: u64, index: u64) -> f64 {
    (splitmix64(seed, index) >> 40) as f64 / f64::from(1u32 << 24)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SplitMix64 from 1234567: the values of its authors' C code. FNV-1a: the test vectors of its authors.
    #[test]
    fn follows_the_published_sequences() {
        let got: Vec<u64> = (0..3).map(|index| splitmix64(1234567, index)).collect();
        assert_eq!(got, [6457827717110365317, 3203168211198807973, 9817491932198370423]);
        assert_eq!(
            (fnv1a(b""), fnv1a(b"a"), fnv1a(b"foobar")),
            (0xcbf29ce484222325, 0xaf63dc4c8601ec8c, 0x85944171f73967e8)
        );
    }

    #[test]
    fn is_uniform() {
        let mean = (0..100_000).map(|index| uniform(7, index)).sum::<f64>() / 1e5;
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
    }
}
