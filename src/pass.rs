//! What a pass is, and how it is declared and given its options.

mod price;

use std::{any::Any, collections::BTreeMap, fmt, sync::Arc};

use globset::GlobSet;
use rayon::prelude::*;
use serde::Serialize;

pub use self::price::{Minimize, Preference, Price, Yardstick};
use crate::{
    analysis::{
        moments,
        shapes::{Shapes, declared_dims},
    },
    codec::Runtime,
    ir::{Graph, NodeId, Outlet},
    proto::tensor_shape_proto::dimension,
    refit::Kept,
};

/// What a pass may do to the values a model computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fidelity {
    /// Nothing: outputs stay bit for bit the same.
    Exact,
    /// Reassociate arithmetic: outputs stay the same to a few rounding errors.
    Rounding,
    /// Approximate: outputs change, and the budget says by how much they may.
    Lossy,
}

impl fmt::Display for Fidelity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Exact => "exact",
            Self::Rounding => "rounding",
            Self::Lossy => "lossy",
        })
    }
}

/// A rewrite of the graph.
///
/// A pass is a plain struct. Its fields are its options, its doc comment is its help, and its place in
/// [`PASSES`](crate::passes::PASSES) is its registration.
pub trait Pass: fmt::Debug + Send + Sync {
    /// Rewrites `graph`.
    ///
    /// # Errors
    ///
    /// When the pass cannot go on; the pipeline then drops whatever it had done. A pattern that does not match is not
    /// an error.
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()>;

    /// Whether an option fixes how much it does, so that the budget does not drive it.
    fn is_fixed(&self) -> bool {
        true
    }

    /// How many kinds of changes it can be told to prefer to others (see [`Price::prefers`]).
    fn kinds(&self) -> usize {
        0
    }
}

/// A pass as the command line knows it.
pub trait Declare: Pass + clap::Parser + Sized + 'static {
    /// The word that stands for it in `--passes`.
    const NAME: &'static str;
    /// What it may do to the model's outputs.
    const FIDELITY: Fidelity;
    /// Whether it stores weights as other passes would not have them: `simplify` runs it before and after those, and only where nothing
    /// comes after `simplify`.
    const STORES: bool = false;
}

/// Makes a pass of its name and options.
type Build = fn(&[String]) -> Result<Box<dyn Pass>, clap::Error>;

/// An entry of [`PASSES`](crate::passes::PASSES).
#[derive(Debug)]
pub struct PassInfo {
    /// See [`Declare::NAME`].
    pub name: &'static str,
    /// See [`Declare::FIDELITY`].
    pub fidelity: Fidelity,
    /// See [`Declare::STORES`].
    pub stores: bool,
    build: Build,
    command: fn() -> clap::Command,
}

impl PassInfo {
    /// The entry of `P`.
    #[must_use]
    pub const fn of<P: Declare>() -> Self {
        Self {
            name: P::NAME,
            fidelity: P::FIDELITY,
            stores: P::STORES,
            build: |argv| Ok(Box::new(P::try_parse_from(argv)?)),
            command: P::command,
        }
    }

    /// The pass, with the options written `:key=value…` after its name.
    ///
    /// # Errors
    ///
    /// When an option is unknown or its value does not parse.
    pub fn build(&self, options: &[&str]) -> Result<Box<dyn Pass>, clap::Error> {
        let options = options.iter().map(|option| format!("--{option}"));
        let argv: Vec<_> = std::iter::once(self.name.to_owned()).chain(options).collect();
        (self.build)(&argv)
    }

    /// Its first line of help.
    #[must_use]
    pub fn summary(&self) -> String {
        (self.command)().get_about().map(ToString::to_string).unwrap_or_default()
    }

    /// Its whole help, options as they are written in `--passes`.
    #[must_use]
    pub fn help(&self) -> String {
        let command = (self.command)();
        let about = command.get_long_about().or(command.get_about()).map(ToString::to_string).unwrap_or_default();
        let mut text = format!("{}\n\n{about}\n", self.name);
        let options: Vec<_> = command.get_arguments().filter(|a| a.get_long().is_some_and(|l| l != "help")).collect();
        if !options.is_empty() {
            text.push_str("\nOptions\n");
        }
        for option in options {
            let help = option.get_long_help().or(option.get_help()).map(ToString::to_string).unwrap_or_default();
            let long = option.get_long().unwrap_or_default();
            text.extend(["\n  :", long, "=…\n      ", &help.replace('\n', "\n      "), "\n"]);
        }
        text
    }
}

/// The table of passes in the README.
#[must_use]
pub fn table(passes: &[PassInfo]) -> String {
    let row = |pass: &PassInfo| format!("| `{}` | {} | {} |\n", pass.name, pass.fidelity, pass.summary());
    let head = "| pass | fidelity | what it does |\n|---|---|---|\n";
    std::iter::once(head.to_owned()).chain(passes.iter().map(row)).collect()
}

/// What is counted whether or not anything is done.
pub const COUNTED_ONLY: [&str; 2] = ["weights declined", "weights seen"];

/// What a pass may use besides the graph, and where it leaves word of what it did.
#[derive(Debug, Default)]
pub struct Context {
    /// The input shapes at which the model is verified, by input name.
    pub bound: BTreeMap<String, Vec<usize>>,
    /// Nodes and weights that no lossy pass may touch.
    pub keep: GlobSet,
    /// How much the pass may do, if the budget drives it.
    pub price: Price,
    /// The error that the pass predicts: relative, squared, summed over layers.
    pub predicted: f64,
    /// What it did, for the report: `("layers factored", 3)`.
    pub tally: BTreeMap<&'static str, u64>,
    /// What it left alone, and why.
    pub declined: Vec<String>,
    /// What is to be saved.
    pub minimize: Minimize,
    /// What is to run the result.
    pub runtime: Runtime,
    /// Whether the size of the result is given, and not its error.
    pub has_target: bool,
    /// What layers read, over samples; empty where there are none.
    pub moments: Arc<moments::Table>,
    /// What batch normalizations say of it where there are no samples.
    pub prior: Arc<moments::Table>,
    /// What layers read over other samples, which show how far a fit to the first can be trusted.
    pub held_out: Arc<moments::Table>,
    /// What measures a graph against the one that the first lossy pass saw, where there are samples.
    pub yardstick: Option<Arc<Yardstick>>,
    /// Which channels are left of the values of the model that the first lossy pass saw.
    pub kept: Kept,
    /// Whether what is left is to be fitted to that model.
    pub refit: bool,
    /// What was found out and is the same at every price, by a hash of what it depends on.
    pub(crate) memo: BTreeMap<u64, Arc<dyn Any + Send + Sync>>,
}

impl Context {
    /// A context in which inputs have the shapes of `bound`.
    #[must_use]
    pub fn at(bound: BTreeMap<String, Vec<usize>>) -> Self {
        Self { bound, ..Self::default() }
    }

    /// Counts one more of `what`.
    pub fn count(&mut self, what: &'static str) {
        self.add(what, 1);
    }

    /// Counts `n` more of `what`, if there are any.
    pub fn add(&mut self, what: &'static str, n: usize) {
        if n > 0 {
            *self.tally.entry(what).or_default() += n as u64;
        }
    }

    /// Notes that something was left alone.
    pub fn decline(&mut self, what: &str, why: &str) {
        self.declined.push(format!("{what}: {why}"));
    }

    /// Whether `--keep` names any of these.
    #[must_use]
    pub fn is_kept(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.keep.is_match(name))
    }

    /// What is known of what layers read, over samples or without any.
    #[must_use]
    pub fn statistics(&self) -> Arc<moments::Table> {
        Arc::clone(if self.moments.is_empty() { &self.prior } else { &self.moments })
    }

    /// Whether the answer to a question of this `key` is known.
    fn knows(&self, key: u64) -> bool {
        self.memo.contains_key(&key)
    }

    /// What measures changes of `graph` against `graph` itself, since what earlier passes did is no error of this one; `None`
    /// where there are no samples, and where all questions of these `keys` are answered already.
    pub(crate) fn yardstick_for(&self, graph: &Graph, keys: impl Iterator<Item = u64>) -> Option<Yardstick> {
        let open = keys.filter(|&key| !self.knows(key)).count();
        if open == 0 { None } else { self.yardstick.as_ref()?.of(graph, &self.bound, open) }
    }

    /// What `find` finds, which depends on what `key` is a hash of, and on nothing else.
    pub(crate) fn remember<T: Any + Send + Sync>(&mut self, key: u64, find: impl FnOnce() -> T) -> Arc<T> {
        if let Some(Ok(known)) = self.memo.get(&key).map(|known| Arc::clone(known).downcast::<T>()) {
            return known;
        }
        let found = Arc::new(find());
        self.memo.insert(key, Arc::<T>::clone(&found));
        found
    }

    /// As [`remember`](Self::remember), for each of several `questions`, which are answered side by side.
    pub(crate) fn remember_all<Q: Sync, T: Any + Send + Sync>(
        &mut self,
        questions: &[Q],
        key: impl Fn(&Q) -> u64 + Sync,
        find: impl Fn(&Q) -> T + Sync,
    ) -> Vec<Arc<T>> {
        let keys: Vec<_> = questions.par_iter().map(&key).collect();
        let open: Vec<_> = questions.iter().zip(&keys).filter(|(_, key)| !self.knows(**key)).collect();
        let found: Vec<_> = open.par_iter().map(|(question, key)| (**key, Arc::new(find(question)))).collect();
        self.memo.extend(found.into_iter().map(|(key, found)| (key, found as Arc<dyn Any + Send + Sync>)));
        questions.iter().zip(keys).map(|(question, key)| self.remember(key, || find(question))).collect()
    }

    /// The shapes of `graph` at the verified input shapes.
    #[must_use]
    pub fn shapes(&self, graph: &Graph) -> Shapes {
        Shapes::infer(graph, &self.bound)
    }

    /// The shapes of `graph` where its inputs' open axes have lengths that nothing else has by chance, and [beside](Shapes::other)
    /// them those at other lengths: what is open is told from what is alike at the verified shapes only. Where the graph can't
    /// have such shapes, those at which it is verified.
    #[must_use]
    pub fn telling_shapes(&self, graph: &Graph) -> Shapes {
        let shapes = self.shapes(graph);
        let fits = |other: &Shapes| {
            let is_known = |value: Outlet| shapes.known(value).is_none() || other.known(value).is_some();
            let mut values =
                graph.ops().into_iter().flat_map(|id| (0..graph.output_count(id)).map(move |slot| id.at(slot)));
            other.is_possible() && values.all(is_known)
        };
        let at = |open: Open, shift: usize| Shapes::infer(graph, &telling(graph, &self.bound, open, shift));
        let both = |open: Open| {
            let first = Some(at(open, 0)).filter(fits)?;
            let other = Some(at(open, 1)).filter(fits)?;
            Some(first.beside(Some(other)))
        };
        [Open::Apart, Open::Alike, Open::Batch].into_iter().find_map(both).unwrap_or(shapes)
    }

    /// Forgets what the last pass left, but not what holds for the model.
    pub(crate) fn reset(&mut self, price: Price) {
        self.price = price;
        self.predicted = 0.0;
        self.tally.clear();
        self.declined.clear();
    }
}

/// What is taken for open of the axes that the inputs of a graph leave open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Open {
    /// All, each name of a length of its own, for up to seven names.
    Apart,
    /// All, those after the first axis of an input of one length.
    Alike,
    /// The first axis of each input.
    Batch,
}

/// Input shapes at lengths of the open axes that `shift` chooses. First axes get a prime, the others the product of one and 32,
/// since a network may halve an image five times. One name stands for one length.
fn telling(
    graph: &Graph,
    bound: &BTreeMap<String, Vec<usize>>,
    open: Open,
    shift: usize,
) -> BTreeMap<String, Vec<usize>> {
    const BATCHES: [usize; 2] = [7, 11];
    const PRIMES: [usize; 7] = [3, 5, 7, 11, 13, 17, 19];
    const HALVED: usize = 32;
    let (mut shapes, mut named) = (bound.clone(), BTreeMap::new());
    for input in graph.fed_inputs() {
        let Some(known) = shapes.get_mut(input.info.name()) else { continue };
        let dims = declared_dims(&input.info);
        for (axis, extent) in known.iter_mut().enumerate() {
            let dim = dims.and_then(|dims| dims.get(axis)?.value.as_ref());
            let is_given = matches!(dim, Some(dimension::Value::DimValue(extent)) if *extent >= 0);
            if is_given || axis > 0 && open == Open::Batch {
                continue;
            }
            let name = match dim {
                Some(dimension::Value::DimParam(name)) if !name.is_empty() => name.clone(),
                _ => format!("{}:{axis}", input.info.name()),
            };
            let place = if open == Open::Alike { 0 } else { named.len() };
            let next = PRIMES[(place + shift) % PRIMES.len()] * HALVED;
            *extent = *named.entry(name).or_insert(if axis == 0 { BATCHES[shift % 2] } else { next });
        }
    }
    shapes
}

/// Runs `f` on `graph` and on every body in it, outer ones first.
pub fn everywhere(graph: &mut Graph, f: &mut impl FnMut(&mut Graph)) {
    f(graph);
    for id in graph.holders() {
        for body in graph.bodies_mut(id) {
            everywhere(&mut body.graph, f);
        }
    }
}

/// The operators of `graph` whose bodies a lossy pass may change. Where the error that samples show decides how much it
/// does, what is inside an `If` stays: samples may never take a branch, and then anything done to it costs nothing.
pub fn open_to_loss(graph: &Graph, is_fixed: bool, cx: &mut Context) -> Vec<NodeId> {
    let mut open = graph.holders();
    open.retain(|&id| {
        let decides = !is_fixed && graph.op_of(id, "If").is_some();
        if decides {
            cx.decline(graph.label(id), "the samples may take one of its branches only");
        }
        !decides
    });
    open
}

/// Applies `rule` to every operator of `graph` and of the bodies in it; says how often the rule found work.
pub fn rewrite(graph: &mut Graph, rule: impl Fn(&mut Graph, NodeId) -> Option<()>) -> usize {
    let mut count = 0;
    everywhere(graph, &mut |graph| count += graph.ops().into_iter().filter_map(|node| rule(graph, node)).count());
    count
}

/// As [`rewrite`], for a rule that asks for the shapes of the graph that the operator is in, see [`everywhere_shaped`].
pub fn rewrite_shaped(graph: &mut Graph, rule: &impl Fn(&mut Graph, &Shapes, NodeId) -> Option<()>) -> usize {
    let all = |graph: &mut Graph, shapes: &Shapes| {
        graph.ops().into_iter().filter_map(|node| rule(graph, shapes, node)).count()
    };
    everywhere_shaped(graph, &all)
}

/// Runs `f` on `graph` and on every body in it, outer ones first, each with its shapes, and adds up what it answers. The
/// shapes are those that hold for every caller: what holds at the verified shape alone is not always so.
pub fn everywhere_shaped(graph: &mut Graph, f: &impl Fn(&mut Graph, &Shapes) -> usize) -> usize {
    let declared = |graph: &Graph| Shapes::infer(graph, &BTreeMap::new());
    everywhere_inferring(graph, &declared, &|graph, infer| {
        let shapes = infer(graph);
        f(graph, &shapes)
    })
}

/// Finds the shapes of a graph.
pub type Infer<'a> = dyn Fn(&Graph) -> Shapes + 'a;

/// Runs `f` on `graph`, whose shapes `infer` finds, and then on the bodies in what it left, each with what finds its shapes.
pub fn everywhere_inferring(
    graph: &mut Graph,
    infer: &Infer<'_>,
    f: &impl Fn(&mut Graph, &Infer<'_>) -> usize,
) -> usize {
    let mut count = f(graph, infer);
    let holders = graph.holders();
    if holders.is_empty() {
        return count;
    }
    let shapes = infer(graph);
    for id in holders {
        let infer = shapes.within(graph, id);
        for body in graph.bodies_mut(id) {
            count += everywhere_inferring(&mut body.graph, &infer, f);
        }
    }
    count
}
