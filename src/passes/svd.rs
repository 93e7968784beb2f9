//! See [`Svd`].

use super::rewrite::{Rewrite, Strength};
use crate::{
    factor::Family,
    ir::Graph,
    pass::{Context, Declare, Fidelity, Pass},
};

/// Split the weights of layers into two factors of low rank.
///
/// W (o×d) becomes B·A, B o×r and A r×d, the best approximation of its rank (Eckart & Young 1936; Xue 2013); one layer becomes
/// two, and the bias stays with the second. That saves parameters where r < o·d / (o + d). A convolution becomes k×k into r channels
/// and 1×1, or 1×1 into r channels and k×k, whichever costs less for its error; a recurrence reads a product with r columns.
///
/// With samples, it is the best approximation of what the layer makes of what it reads: B holds the first eigenvectors of
/// W·C·Wᵀ, C the covariance of what is read, and A is Bᵀ·W (Zhang 2015; Chen 2021). The bias takes the mean of what is lost,
/// and the layers from the first one that is split on are fitted to the original, one after another: each is fitted whole to
/// what it reads now, and split anew.
///
/// Applies when: one operand of a `Gemm`, `MatMul`, `Conv` or `ConvTranspose`, or the input weight of an `LSTM`, `GRU` or `RNN`, is
/// constant. Convolutions are split group by group, stacks of matrices one by one. A weight with several readers is split for all
/// of them or for none.
///
/// Fidelity: lossy. Without `rank`, `energy` or `evbmf`, the error budget sets the rank of each layer: a multiple of 8 where there
/// are enough below break-even.
#[derive(Debug, clap::Parser)]
#[command(name = "svd")]
pub(super) struct Svd {
    /// The rank of every layer, at least 1.
    #[arg(long, value_parser = super::positive, conflicts_with = "energy")]
    rank: Option<usize>,
    /// The least rank that keeps this share of a weight's squared norm, between 0 and 1.
    #[arg(long, value_parser = super::share)]
    energy: Option<f64>,
    /// The rank that stands out from noise, by empirical variational Bayesian matrix factorization (Nakajima 2013).
    #[arg(long, conflicts_with_all = ["rank", "energy"])]
    evbmf: bool,
}

impl Declare for Svd {
    const NAME: &'static str = "svd";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

impl Svd {
    fn strength(&self) -> Strength {
        Strength::of(self.rank, self.energy, self.evbmf)
    }
}

impl Pass for Svd {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let families = &[Family::After, Family::Before];
        let rewrite = Rewrite { name: Self::NAME, families, preferred: &[], strength: self.strength(), wants: "" };
        rewrite.start(graph, cx);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.strength().is_fixed()
    }
}
