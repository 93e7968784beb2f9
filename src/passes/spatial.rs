//! See [`Spatial`].

use super::rewrite::{Rewrite, Strength};
use crate::{
    factor::Family,
    ir::Graph,
    pass::{Context, Declare, Fidelity, Pass},
};

/// Split the kernels of `Conv` by axes: one along the first, then one along the others.
///
/// A k×k kernel of O×C channels becomes a k×1 kernel into r channels and a 1×k kernel of these (Jaderberg 2014), or the other way
/// round where that is closer. Strides, pads and dilations go with their axis.
///
/// With samples, the first kernel is the one whose results tell most of what the layer makes of what it reads, and the second is
/// fitted to them; the layers after the first one that is split are fitted to the original, one after another.
///
/// Applies when: a constant kernel has more than one element along two axes or more.
///
/// Fidelity: lossy. Without `rank` or `energy`, the error budget sets the rank of each layer.
#[derive(Debug, clap::Parser)]
#[command(name = "spatial")]
pub(super) struct Spatial {
    /// The channels between both kernels, for each group of channels.
    #[arg(long, value_parser = super::positive, conflicts_with = "energy")]
    rank: Option<usize>,
    /// The least rank that keeps this share of the energy of what a layer makes, between 0 and 1.
    #[arg(long, value_parser = super::share)]
    energy: Option<f64>,
}

impl Declare for Spatial {
    const NAME: &'static str = "spatial";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

impl Pass for Spatial {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let strength = Strength::of(self.rank, self.energy, false);
        let rewrite = Rewrite {
            name: Self::NAME,
            families: SPATIAL,
            preferred: &[],
            strength,
            wants: "has no kernel of two axes",
        };
        rewrite.start(graph, cx);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.rank.is_some() || self.energy.is_some()
    }
}

/// Either axis of a kernel first, or the third of three.
pub(super) const SPATIAL: &[Family] =
    &[Family::Spatial { first: 0 }, Family::Spatial { first: 1 }, Family::Spatial { first: 2 }];
