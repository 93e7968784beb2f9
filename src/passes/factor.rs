//! See [`Factor`].

use super::rewrite::{Rewrite, Strength};
use crate::{
    factor::Family,
    ir::Graph,
    pass::{Context, Declare, Fidelity, Pass},
};

/// Split each layer in the way that costs least for its error: as `svd`, `spatial`, `tucker`, `separate`, `group` or `kron` would.
///
/// Every way to split a layer is priced by what it saves and by the error that it makes, weighed by how much the model minds an
/// error of that layer; of all points on the lower convex hull, each layer gets the one that the budget allows.
///
/// Applies when: any of these passes does.
///
/// Fidelity: lossy. Without `energy`, the error budget decides.
#[derive(Debug, clap::Parser)]
#[command(name = "factor")]
pub(super) struct Factor {
    /// The cheapest split of each layer that keeps this share of the energy of what it makes, between 0 and 1.
    #[arg(long, value_parser = super::share)]
    energy: Option<f64>,
}

impl Declare for Factor {
    const NAME: &'static str = "factor";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

/// All ways to split a layer.
const FAMILIES: &[Family] = &[
    Family::After,
    Family::Before,
    Family::Both,
    Family::Spatial { first: 0 },
    Family::Spatial { first: 1 },
    Family::Spatial { first: 2 },
    Family::Separate,
    Family::Mixed,
    Family::Grouped { bypass: 0 },
    Family::Kronecker,
];

/// Kinds of splits: where one is chosen layer by layer, what the refit makes up for of each is not known yet.
const KINDS: [&[Family]; 2] = [
    &[Family::After, Family::Before, Family::Both],
    &[Family::Spatial { first: 0 }, Family::Spatial { first: 1 }, Family::Spatial { first: 2 }],
];

impl Pass for Factor {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let strength = Strength::of(None, self.energy, false);
        let preferred = cx.price.prefers.map_or(&[][..], |preference| KINDS[preference.kind]);
        let rewrite = Rewrite { name: Self::NAME, families: FAMILIES, preferred, strength, wants: "" };
        rewrite.start(graph, cx);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.energy.is_some()
    }

    fn kinds(&self) -> usize {
        KINDS.len()
    }
}
