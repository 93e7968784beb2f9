//! The rank that stands out from noise.

/// The rank of a matrix of so many rows and columns by the global analytic solution of empirical variational Bayesian matrix
/// factorization (Nakajima 2013): singular values above what noise of the variance that fits best would give. `energies` are
/// all squared singular values, descending.
#[must_use]
pub fn evbmf_rank(energies: &[f64], rows: usize, columns: usize) -> usize {
    let (small, large) = (rows.min(columns) as f64, rows.max(columns) as f64);
    let count = energies.len().min(rows.min(columns));
    let energies = &energies[..count];
    if count == 0 || energies[0] <= 0.0 {
        return 0;
    }
    let alpha = small / large;
    // An approximation of where the noise ends (Nakajima 2013, equation 24).
    let tau = 2.5129 * alpha.sqrt();
    let edge = (1.0 + tau) * (1.0 + alpha / tau);
    let free_energy = |variance: f64| {
        let of = |energy: &f64| {
            let x = energy / (large * variance);
            if x <= edge {
                return x - x.max(f64::MIN_POSITIVE).ln();
            }
            let half = x - (1.0 + alpha);
            let tau = 0.5 * (half + (half * half - 4.0 * alpha).max(0.0).sqrt());
            x - tau + ((tau + 1.0) / x).ln() + alpha * (tau / alpha + 1.0).ln()
        };
        energies.iter().map(of).sum::<f64>() + (small - count as f64) * variance.ln()
    };
    let total: f64 = energies.iter().sum();
    let high = total / (small * large);
    let bound = ((small / (1.0 + alpha)).ceil() as usize).clamp(1, count) - 1;
    let tail = &energies[bound..];
    let low = (tail[0] / (large * edge)).max(tail.iter().sum::<f64>() / tail.len() as f64 / large).max(high * 1e-12);
    let (mut low, mut high) = (low.min(high).ln(), high.ln());
    // The free energy has one minimum between both in practice; a golden section finds it.
    let ratio = (5.0_f64.sqrt() - 1.0) / 2.0;
    for _ in 0..64 {
        let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
        if free_energy(a.exp()) <= free_energy(b.exp()) {
            high = b;
        } else {
            low = a;
        }
    }
    let variance = f64::midpoint(low, high).exp();
    energies.iter().filter(|&&energy| energy > large * variance * edge).count()
}

#[cfg(test)]
mod tests {
    use nalgebra::DMatrix;
    use rand_xoshiro::{Xoshiro256PlusPlus, rand_core::SeedableRng};

    use super::*;
    use crate::linalg::{Spectrum, normal};

    #[test]
    fn the_rank_of_a_signal_in_noise_is_found() {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(3);
        let mut draw = |rows: usize, columns: usize| DMatrix::from_fn(rows, columns, |_, _| normal(&mut random));
        for (rank, noise) in [(0, 1.0), (3, 0.5), (12, 1.0)] {
            let signal = draw(60, rank) * draw(rank, 90);
            let matrix = signal + draw(60, 90) * noise;
            let spectrum = Spectrum::of(&matrix, None).unwrap();
            assert_eq!(evbmf_rank(&spectrum.energies, 60, 90), rank);
        }
    }
}
