//! See [`ExactStorage`].

use ::half::f16;

use crate::{
    codec::{packs, spelled_bytes},
    coding::exact_table,
    ir::{Graph, Kind, Outlet, Tensor, Weight},
    pass::{Context, Declare, Fidelity, Pass, everywhere},
};

/// Store weights that have at most 256 different values as a table of these, and those that half precision holds in it.
///
/// What shared, quantized or half-precise weights were exported as floats is stored as what it is. Each is an initializer of codes and a
/// `Gather`, or of halves and a `Cast`, which runtimes compute once, when they load the file.
///
/// Applies when: the weight takes at least 4096 bytes, and less than three quarters of them so. `simplify` makes tables first, since what fuses a scale into
/// a weight makes many values of few, and all of it last, but only where no pass comes after.
///
/// Fidelity: exact.
#[derive(Debug, clap::Parser)]
#[command(name = "exact-storage")]
pub(super) struct ExactStorage {
    /// Tables alone.
    #[arg(long)]
    tables: bool,
}

impl Declare for ExactStorage {
    const NAME: &'static str = "exact-storage";
    const FIDELITY: Fidelity = Fidelity::Exact;
    const STORES: bool = true;
}

/// The share of its bytes below which a weight is worth storing otherwise: what is shared by others, or spelled in a few nodes, is not.
const WORTH: f64 = 0.75;
/// Smaller weights are not worth the nodes.
const FEWEST_BYTES: usize = 4096;

impl Pass for ExactStorage {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let (mut tables, mut halves) = (0, 0);
        everywhere(graph, &mut |graph| {
            for id in graph.order() {
                if let Some(weight) = stored(graph, id.out(), self.tables) {
                    *(if weight.storage().codes().is_some() { &mut tables } else { &mut halves }) += 1;
                    graph.set_weight(id.out(), weight);
                }
            }
        });
        cx.add("weights that are tables of their values", tables);
        cx.add("weights in half precision", halves);
        Ok(())
    }
}

/// The constant `value` as it takes fewest bytes, in half precision only if it may be, if that is much less than it does.
fn stored(graph: &Graph, value: Outlet, tables_only: bool) -> Option<Weight> {
    let Kind::Const(_) = graph.kind(value.node) else { return None };
    let weight = graph.weight(value).filter(|weight| !weight.is_stored())?;
    let tensor = weight.value();
    let is_float = crate::ir::tensor::is_float(tensor.dtype());
    (is_float && tensor.byte_len() >= FEWEST_BYTES && !graph.is_pinned(value) && !graph.is_output(value))
        .then_some(())?;
    let half = if !tables_only && may_be_halves(tensor) { Weight::half(tensor.clone()) } else { None };
    let ways = [exact_table(tensor, packs(graph.opset())), half];
    let cost = |weight: Weight| Some((spelled_bytes(graph, value, &weight)?, weight));
    let (bytes, weight) = ways.into_iter().flatten().filter_map(cost).min_by_key(|(bytes, _)| *bytes)?;
    ((bytes as f64) < tensor.stored_len() as f64 * WORTH).then_some(weight)
}

/// Whether half precision holds some of the elements, where they are looked at cheaply: of most weights it does not.
fn may_be_halves(tensor: &Tensor) -> bool {
    const LOOKED_AT: usize = 64;
    let step = (tensor.len() / LOOKED_AT).max(1);
    let some = tensor.floats_at((0..tensor.len()).step_by(step));
    some.is_none_or(|some| some.iter().all(|&value| f64::from(f16::from_f64(value)) == value))
}
