//! See [`Tucker`].

use super::rewrite::{Rewrite, Strength};
use crate::{
    factor::Family,
    ir::Graph,
    pass::{Context, Declare, Fidelity, Pass},
};

/// Split the kernels of `Conv` in three: channels are mixed into fewer, then comes the kernel, then they are mixed again.
///
/// A k×k kernel of O×C channels becomes 1×1 into r₁ channels, k×k into r₂, and 1×1 into O (Tucker-2; Kim 2016).
///
/// With samples, r₁ and r₂ channels are those that tell most of what the layer makes of what it reads, and the kernel between is
/// fitted to them; the layers after the first one that is split are fitted to the original, one after another.
///
/// Applies when: a constant kernel has more than one element.
///
/// Fidelity: lossy. Without `energy`, the error budget sets both ranks of each layer.
#[derive(Debug, clap::Parser)]
#[command(name = "tucker")]
pub(super) struct Tucker {
    /// The cheapest ranks that keep this share of the energy of what a layer makes, between 0 and 1.
    #[arg(long, value_parser = super::share)]
    energy: Option<f64>,
}

impl Declare for Tucker {
    const NAME: &'static str = "tucker";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

impl Pass for Tucker {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let strength = Strength::of(None, self.energy, false);
        let rewrite =
            Rewrite { name: Self::NAME, families: &[Family::Both], preferred: &[], strength, wants: "has no kernel" };
        rewrite.start(graph, cx);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.energy.is_some()
    }
}
