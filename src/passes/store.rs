//! Storing weights in fewer bytes: what the passes that do so share.

mod site;

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

pub(super) use self::site::Way;
use self::site::{Coded, Site};
use super::{
    menu::{Candidate, Choosing, Menu, allocate, probe},
    rewrite::Statistics,
};
use crate::{
    analysis::shapes::Shapes,
    codec::{Runtime, is_hidden},
    ir::{DType, Graph, Kind, NodeId, Op, Outlet, Storage, Tensor, Weight},
    pass::{COUNTED_ONLY, Context, Minimize, open_to_loss},
    refit::Bias,
};

/// A pass that stores weights in other ways.
#[derive(Clone, Debug)]
pub(super) struct Storing {
    /// The name of the pass.
    pub(super) name: &'static str,
    /// The ways, of which the price of the error chooses, or those of which each weight takes the one of least error.
    pub(super) ways: Vec<Way>,
    /// Whether each weight is stored so, whatever the error.
    pub(super) is_fixed: bool,
}

/// What a weight may become.
struct Choices {
    site: Site,
    menu: Menu<Way>,
    coded: Vec<Arc<Option<Coded>>>,
    ways: Vec<Way>,
}

impl Choices {
    fn coded(&self, way: Way) -> Option<&Coded> {
        let place = self.ways.iter().position(|&other| other == way)?;
        (*self.coded[place]).as_ref()
    }
}

impl Choosing<Way> for Choices {
    fn menu(&self) -> &Menu<Way> {
        &self.menu
    }

    fn menu_mut(&mut self) -> &mut Menu<Way> {
        &mut self.menu
    }

    fn label(&self, _graph: &Graph) -> String {
        self.site.label.clone()
    }

    fn put(&self, graph: &Graph, candidate: Candidate<Way>) -> Option<Graph> {
        let mut trial = graph.clone();
        self.site.store(&mut trial, self.coded(candidate.form)?, "trial");
        Some(trial)
    }
}

impl Storing {
    /// Stores weights of the outermost graph, and of the bodies in it.
    pub(super) fn start(&self, graph: &mut Graph, cx: &mut Context) {
        if !self.is_fixed && cx.minimize != Minimize::Bytes {
            return cx.decline("all weights", "to store them in fewer bytes saves nothing of what is to be saved");
        }
        let (mut seen, mut stored) = (0, 0);
        self.run(graph, cx, true, &mut (&mut seen, &mut stored));
        cx.add(COUNTED_ONLY[0], seen - stored);
        cx.add(COUNTED_ONLY[1], seen);
    }

    fn run(&self, graph: &mut Graph, cx: &mut Context, outermost: bool, counts: &mut (&mut usize, &mut usize)) {
        let statistics = Statistics::of(cx);
        let mut all = self.choices(graph, &statistics, cx, outermost, counts);
        if outermost && !self.is_fixed {
            probe(graph, &mut all, self.name, cx);
        }
        let menus: Vec<_> = all.iter().map(|choices| &choices.menu).collect();
        let chosen: Vec<_> = if self.is_fixed {
            let best = |menu: &&Menu<Way>| menu.candidates.iter().min_by(|a, b| a.error.total_cmp(&b.error)).copied();
            menus.iter().map(best).collect()
        } else {
            allocate(&menus, cx.price).into_iter().map(Option::<&_>::copied).collect()
        };
        for (choices, chosen) in all.iter().zip(chosen) {
            // What loses nothing has no price.
            let free = || choices.menu.candidates.iter().find(|candidate| candidate.error == 0.0).copied();
            let coded = chosen.or_else(free).and_then(|candidate| Some((candidate, choices.coded(candidate.form)?)));
            let Some((candidate, coded)) = coded else {
                cx.decline(&choices.site.name, &self.reason(choices, graph.opset(), cx));
                continue;
            };
            self.apply(graph, choices, (candidate, coded), cx, outermost);
            *counts.1 += 1;
        }
        for id in open_to_loss(graph, self.is_fixed, cx) {
            for body in graph.bodies_mut(id) {
                self.run(&mut body.graph, cx, false, counts);
            }
        }
    }

    /// What each weight of `graph` may become.
    fn choices(
        &self,
        graph: &Graph,
        statistics: &Statistics,
        cx: &mut Context,
        outermost: bool,
        counts: &mut (&mut usize, &mut usize),
    ) -> Vec<Choices> {
        let mut sites = Vec::new();
        // What a budget has chosen before, another would only lower again.
        let fewest = if self.is_fixed { self.ways.iter().map(|way| way.bits()).min().unwrap_or(8) } else { 8 };
        for id in graph.order() {
            let Kind::Const(_) = graph.kind(id) else { continue };
            match Site::of(graph, id.out(), (statistics, cx), (outermost, fewest)) {
                Ok(Some(site)) => sites.push(site),
                Ok(None) => continue,
                Err(why) => cx.decline(graph.name(id.out()), why),
            }
            *counts.0 += 1;
        }
        let questions: Vec<(&Site, Way)> =
            sites.iter().flat_map(|site| self.ways.iter().map(move |&way| (site, way))).collect();
        let key = |&(site, way): &(&Site, Way)| xxh3_64(format!("{} {way:?} stored", site.key).as_bytes());
        let coded = cx.remember_all(&questions, key, |&(site, way)| site.code(graph, statistics, way));
        let choices = |(site, coded): (Site, &[Arc<Option<Coded>>])| {
            let candidate = |(way, coded): (&Way, &Arc<Option<Coded>>)| {
                let coded = (**coded).as_ref()?;
                Some(Candidate { form: *way, error: coded.error, cost: coded.bytes })
            };
            let mut candidates: Vec<_> = self.ways.iter().zip(coded).filter_map(candidate).collect();
            candidates.retain(|candidate| candidate.cost < site.whole);
            candidates.sort_by(|a, b| a.cost.total_cmp(&b.cost).then(a.error.total_cmp(&b.error)));
            let menu = Menu { whole: site.whole, candidates, probes: Vec::new() };
            Choices { site, menu, coded: coded.to_vec(), ways: self.ways.clone() }
        };
        let chunks: Vec<Vec<_>> = coded.chunks(self.ways.len().max(1)).map(<[_]>::to_vec).collect();
        sites.into_iter().zip(&chunks).map(|(site, coded)| choices((site, coded))).collect()
    }

    /// Why a weight stays as it is.
    fn reason(&self, choices: &Choices, opset: i64, cx: &Context) -> String {
        let menu = &choices.menu;
        if choices.coded.iter().all(|coded| coded.is_none()) {
            return Way::why_not(&self.ways, opset);
        }
        let slope = |candidate: &Candidate<Way>| menu.minded(candidate.error) / (menu.whole - candidate.cost);
        let Some(best) = menu.candidates.iter().min_by(|a, b| slope(a).total_cmp(&slope(b))) else {
            return "is too small to gain from it".to_owned();
        };
        let saved = menu.whole - best.cost;
        format!(
            "the best saves {:.0} % of it for an error of {:.1e}, where {:.1e} is allowed for that",
            saved / menu.whole * 100.0,
            menu.minded(best.error).sqrt(),
            (cx.price.per_byte * saved).min(cx.price.ceiling).max(0.0).sqrt()
        )
    }

    /// Stores a weight in one of its ways.
    fn apply(
        &self,
        graph: &mut Graph,
        choices: &Choices,
        (candidate, coded): (Candidate<Way>, &Coded),
        cx: &mut Context,
        outermost: bool,
    ) {
        let site = &choices.site;
        let before = graph.constant(site.weight).cloned();
        site.store(graph, coded, self.name);
        if let (true, true, Some(before)) = (outermost, !matches!(coded.weight.storage(), Storage::Half), before) {
            // What eight bits lose is noise that no fit to a few samples takes back.
            cx.refit |= candidate.form.is_coarse() && !cx.moments.is_empty();
            cx.kept.code(graph.name(site.weight).to_owned(), before);
        }
        cx.predicted += choices.menu.minded(candidate.error) * site.readers as f64;
        cx.count(candidate.form.word());
        let is_uncut = |way: &Way| way.is_cut() && choices.coded(*way).is_none();
        if self.is_fixed && self.ways.iter().any(is_uncut) {
            cx.count("weights that such blocks do not divide");
        }
    }
}

/// Has products of a row or two with large matrices of codes be products with these as they are, where onnxruntime is to run them: it
/// then reads a quarter of the bytes, or less. Of more rows, making integers of them takes longer than that saves, and so it does for
/// small matrices, which stay in the cache (measured with onnxruntime 1.32 on one core with AVX-512: 0.5 of the time for a row by
/// 1024×1024, 1.2 for 16 rows, and 1.1 for a row by 300×100). It rounds what it multiplies by codes: where the budget decides, and the
/// products are not `is_fixed`, the bytes that the codes save are to pay for that too.
pub(super) fn multiply_by_codes(graph: &mut Graph, shapes: &Shapes, is_fixed: bool, cx: &mut Context) {
    const MOST_ROWS: usize = 2;
    const FEWEST_ELEMENTS: usize = 1 << 17;
    /// The relative squared error of eight bits and one scale for some dozens of normal values: (2.2 / 127)² / 12, 2.2 standard
    /// deviations being the largest of 32 in the mean.
    const ROUNDING: f64 = 2.5e-5;
    /// How many times that is to be paid, since products save no bytes, and others might for the same error.
    const MARGIN: f64 = 4.0;
    if cx.runtime != Runtime::Onnxruntime {
        return;
    }
    for id in graph.ops() {
        let Some(value) =
            graph.operand(id, 1).filter(|_| ["Gemm", "MatMul"].iter().any(|kind| graph.op_of(id, kind).is_some()))
        else {
            continue;
        };
        let count = graph.constant(value).map_or(0, Tensor::len);
        let saved =
            graph.weight(value).map_or(0, |weight| weight.value().byte_len().saturating_sub(weight.stored_bytes()));
        let is_paid = is_fixed || ROUNDING * MARGIN <= (cx.price.per_byte * saved as f64).min(cx.price.ceiling);
        if !is_paid || cx.is_kept(&[graph.name(value), graph.label(id)]) {
            continue;
        }
        let rows = graph.operand(id, 0).and_then(|read| shapes.known(read));
        let rows = rows.map_or(usize::MAX, |dims| dims.iter().rev().skip(1).product());
        if count >= FEWEST_ELEMENTS && rows <= MOST_ROWS && by_codes(graph, id, cx).is_some() {
            cx.count("products by codes");
            cx.predicted += ROUNDING;
        }
    }
}

fn by_codes(graph: &mut Graph, node: NodeId, cx: &mut Context) -> Option<()> {
    /// The operator set with `DequantizeLinear` along an axis, and that with blocks, of so many rows at least.
    const OPSETS: (i64, i64) = (13, 21);
    const BLOCK: usize = 16;
    let op = graph.op(node)?.clone();
    let is_one = |name: &str| op.float(name).unwrap_or(1.0) == 1.0;
    let is_plain = is_one("alpha") && is_one("beta") && op.int("transA").unwrap_or(0) == 0;
    (is_plain && !is_hidden(graph, node)).then_some(())?;
    let (x, value) = (graph.operand(node, 0)?, graph.operand(node, 1)?);
    let weight = graph.weight(value).filter(|_| graph.sole_use(value).is_some())?;
    let is_turned = op.int("transB") == Some(1);
    let flipped = if is_turned { weight.permute(&[1, 0])? } else { weight.clone() };
    let Storage::Affine(affine) = flipped.storage() else { return None };
    let [rows, columns] = *affine.codes().dims() else { return None };
    let fits = match *affine.codes().tile() {
        [tile, 1] if tile == rows => graph.opset() >= OPSETS.0,
        [tile, 1] => graph.opset() >= OPSETS.1 && tile >= BLOCK && tile.is_power_of_two(),
        _ => false,
    };
    let is_single = affine.scales().dtype() == DType::Float;
    (fits && is_single && !affine.is_multiplied_by()).then_some(())?;
    let multiplied = Weight::stored(Storage::Affine(affine.clone().to_multiply_by()))?;
    if op.is("MatMul") {
        graph.set_weight(value, multiplied);
        return Some(());
    }
    let bias = graph.operand(node, 2);
    let is_row = |bias: Outlet| graph.constant(bias).is_some_and(|bias| bias.dims() == [columns]);
    bias.is_none_or(is_row).then_some(())?;
    let name = graph.name(value).to_owned();
    let turned = graph.add_const(multiplied, &format!("{name}.turned"));
    cx.kept.turn_coded(&name, graph.name(turned), is_turned);
    let product = Op::new("MatMul").in_place_of(&op);
    match bias {
        None => graph.replace_op(node, product, &[x, turned]),
        Some(bias) => {
            let name = format!("{}.product", graph.name(node.out()));
            let made = graph.add_op(product, &[Some(x), Some(turned)], &[&name], node);
            graph.replace_op(node, Op::new("Add"), &[made.out(), bias]);
        }
    }
    Some(())
}

/// Has what the layers of a weight make keep its mean, where they have a constant bias: Δb = −ΔW·μ.
fn make_up(graph: &mut Graph, site: &Site, lost: &[f64], pass: &str) {
    for linear in site.layers() {
        let bias = Bias::of(graph, linear);
        if let Some(values) = bias.values(graph, linear) {
            let values: Vec<f64> = values.iter().zip(lost).map(|(bias, lost)| bias + lost).collect();
            let _ = bias.set(graph, linear, &values, pass);
        }
    }
}

impl Site {
    /// Stores the weight so.
    fn store(&self, graph: &mut Graph, coded: &Coded, pass: &str) {
        let weight: &Weight = &coded.weight;
        graph.set_weight(self.weight, weight.clone());
        if let Some(lost) = &coded.lost {
            make_up(graph, self, lost, pass);
        }
    }
}
