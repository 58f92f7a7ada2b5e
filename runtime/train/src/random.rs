//! Chance without state, as the engine has it ([`kinglet_engine::random`]), and orders drawn by it.

pub use kinglet_engine::random::{fnv1a, splitmix64, stream, uniform};

/// Puts `items` into an order that follows from `seed` alone (Fisher and Yates; Lemire's multiplication for the range).
pub fn shuffle<T>(items: &mut [T], seed: u64) {
    for last in (1..items.len()).rev() {
        let range = last as u128 + 1;
        let pick = (u128::from(splitmix64(seed, last as u64)) * range) >> 64;
        items.swap(last, pick as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffles_every_item_to_every_place() {
        let mut places = [[0u32; 6]; 6];
        for seed in 0..6000 {
            let mut items: Vec<usize> = (0..6).collect();
            shuffle(&mut items, seed);
            items.iter().enumerate().for_each(|(place, item)| places[*item][place] += 1);
            items.sort_unstable();
            assert_eq!(items, [0, 1, 2, 3, 4, 5]);
        }
        // 1,000 expected of each, standard deviation 29.
        assert!(places.as_flattened().iter().all(|count| (850..1150).contains(count)), "{places:?}");
        shuffle::<u8>(&mut [], 1);
    }
}
