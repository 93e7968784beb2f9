//! See [`Separate`].

use super::rewrite::{Rewrite, Strength};
use crate::{
    factor::Family,
    ir::Graph,
    pass::{Context, Declare, Fidelity, Pass},
};

/// Split the kernels of `Conv` into one for each channel and a mixing of channels.
///
/// A k×k kernel of O×C channels becomes T kernels for each of the C channels, and 1×1 into O (Guo 2018), or, where fewer
/// channels are made than read, 1×1 into O·T and T kernels for each of the O; with T = min(O, k²), nothing is lost.
///
/// With samples, the kernels of a channel are those that tell most of what the layer makes of what it reads there, and the mixing is
/// fitted to all of them together; the layers after the first one that is split are fitted to the original, one after another.
///
/// Applies when: a constant kernel has more than one element, and reads more than one channel.
///
/// Fidelity: lossy. Without `multiplier`, the error budget sets T of each layer.
#[derive(Debug, clap::Parser)]
#[command(name = "separate")]
pub(super) struct Separate {
    /// T, the kernels of each channel.
    #[arg(long, value_parser = super::positive)]
    multiplier: Option<usize>,
}

impl Declare for Separate {
    const NAME: &'static str = "separate";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

impl Pass for Separate {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let strength = Strength::of(self.multiplier, None, false);
        let families = &[Family::Separate, Family::Mixed];
        let rewrite = Rewrite {
            name: Self::NAME,
            families,
            preferred: &[],
            strength,
            wants: "has no kernel of several channels",
        };
        rewrite.start(graph, cx);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.multiplier.is_some()
    }
}
