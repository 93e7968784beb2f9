//! See [`Half`].

use super::store::{Storing, Way};
use crate::{
    ir::Graph,
    pass::{Context, Declare, Fidelity, Pass},
};

/// Store weights in half precision, and compute as before.
///
/// Each weight is an initializer of `FLOAT16` and a `Cast`, which runtimes compute once, when they load the file. What layers make stays
/// in the precision that it had: nothing that a model computes can overflow, as it does where whole models are converted.
///
/// Applies when: the weight is a constant of `FLOAT` or `DOUBLE` with two axes or more, and half precision holds it: one with values
/// beyond 65504 is left alone.
///
/// Fidelity: lossy. What half precision holds exactly costs nothing; for the rest, the error budget decides.
#[derive(Debug, clap::Parser)]
#[command(name = "half")]
pub(super) struct Half {
    /// Store each weight so that half precision holds, whatever the error.
    #[arg(long)]
    all: bool,
}

impl Declare for Half {
    const NAME: &'static str = "half";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

impl Pass for Half {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        Storing { name: Self::NAME, ways: vec![Way::Half], is_fixed: self.is_fixed() }.start(graph, cx);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.all
    }
}
