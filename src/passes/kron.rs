//! See [`Kron`].

use super::rewrite::{Rewrite, Strength};
use crate::{
    factor::Family,
    ir::Graph,
    pass::{Context, Declare, Fidelity, Pass},
};

/// Replace matrices by sums of Kronecker products.
///
/// A `Gemm` or `MatMul` with a constant W of m·n elements becomes, for each of T terms A⊗B, a product by B, of about √(m·n) elements,
/// and one by A, of as many, of what is read as a matrix (Van Loan and Pitsianis 1993). With samples, all A and all B are fitted in
/// turn to what the layer makes of what it reads.
///
/// Applies when: the product is one of rows, and neither extent of the constant is a prime.
///
/// Fidelity: lossy. Without `terms`, the error budget sets T of each layer.
#[derive(Debug, clap::Parser)]
#[command(name = "kron")]
pub(super) struct Kron {
    /// T, the terms of each sum.
    #[arg(long, value_parser = super::positive)]
    terms: Option<usize>,
}

impl Declare for Kron {
    const NAME: &'static str = "kron";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

impl Pass for Kron {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let strength = Strength::of(self.terms, None, false);
        let wants = "is no matrix that rows are multiplied by, of extents that are no primes";
        let rewrite = Rewrite { name: Self::NAME, families: &[Family::Kronecker], preferred: &[], strength, wants };
        rewrite.start(graph, cx);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.terms.is_some()
    }
}
