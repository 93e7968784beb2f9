//! Feeds damaged models to decode, simplify and encode, which must answer with a model or an error: no panic, no hang, no
//! memory out of all proportion. Stable Rust, no instrumentation; the same seed tries the same models.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use onnx_shrink::{
    codec::Model,
    pass::{Context as PassContext, Price},
    pipeline,
    proto::{
        AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, tensor_shape_proto::dimension, type_proto,
    },
};
use prost::Message;
use rand_core::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;

/// A model may take this long.
const TIME: Duration = Duration::from_secs(20);
/// Bytes that the program may hold; it is aborted when it asks for more.
const MEMORY: u64 = 2 << 30;

/// Feed damaged models to the program for a while.
///
/// What goes wrong is written to `fixtures/fuzz`, so that the tests try it from then on.
#[derive(Debug, clap::Args)]
pub(crate) struct Fuzz {
    /// How long to go on.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Which models to try.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl Fuzz {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
        let seeds = ["backend", "roundtrip", "invalid", "fuzz"].map(|folder| models(&fixtures.join(folder))).concat();
        ensure!(seeds.len() > 100, "there are no models to damage below {}", fixtures.display());
        let found = fixtures.join("fuzz");
        fs::create_dir_all(&found)?;
        let current = std::env::temp_dir().join(format!("onnx-shrink-fuzz-{}.onnx", std::process::id()));
        let started = Arc::new(AtomicU64::new(0));
        let begin = Instant::now();
        println!("should this be aborted, see {}", current.display());
        rustix::process::setrlimit(
            rustix::process::Resource::As,
            rustix::process::Rlimit { current: Some(MEMORY), maximum: Some(MEMORY) },
        )?;
        watch(&started, begin, current.clone());
        std::panic::set_hook(Box::new(|_| ()));
        let mut random = Xoshiro256PlusPlus::seed_from_u64(self.seed);
        let (mut tried, mut decoded, mut failures) = (0_u64, 0_u64, 0_u64);
        while begin.elapsed() < Duration::from_secs(self.seconds) {
            let model = Damage { random: &mut random, seeds: &seeds }.model();
            fs::write(&current, &model).context("the current model can't be kept")?;
            started.store(begin.elapsed().as_millis() as u64 + 1, Ordering::Relaxed);
            let outcome = catch_unwind(AssertUnwindSafe(|| attempt(&model)));
            started.store(0, Ordering::Relaxed);
            let why = match outcome {
                Ok(Err(why)) => Some(why),
                Err(panic) => {
                    let text = panic.downcast_ref::<String>().cloned();
                    Some(format!(
                        "panic: {}",
                        text.or_else(|| panic.downcast_ref::<&str>().map(|&s| s.to_owned())).unwrap_or_default()
                    ))
                }
                Ok(Ok(was_decoded)) => {
                    decoded += u64::from(was_decoded);
                    None
                }
            };
            tried += 1;
            if let Some(why) = why {
                failures += 1;
                let path = found.join(format!("{:016x}.onnx", xxhash_rust::xxh3::xxh3_64(&model)));
                fs::write(&path, &model)?;
                println!("{}: {why}", path.display());
            }
        }
        fs::remove_file(&current)?;
        println!("{tried} models tried, {decoded} of them decoded, {failures} failures");
        if failures > 0 {
            bail!("see fixtures/fuzz");
        }
        Ok(())
    }
}

/// Ends the program when a model takes too long, and says where the model is.
fn watch(started: &Arc<AtomicU64>, begin: Instant, current: PathBuf) {
    let started = Arc::clone(started);
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let since = started.load(Ordering::Relaxed);
            if since > 0 && begin.elapsed() > Duration::from_millis(since) + TIME {
                println!("{}: it takes too long", current.display());
                std::process::abort();
            }
        }
    });
}

fn models(folder: &Path) -> Vec<Vec<u8>> {
    let mut paths: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.into_iter().filter_map(|path| fs::read(path).ok()).filter(|bytes| bytes.len() < 20_000).collect()
}

/// Decodes, simplifies and encodes; whether it could be decoded, or what is wrong.
fn attempt(bytes: &[u8]) -> Result<bool, String> {
    let Ok(mut model) = Model::decode(bytes.to_vec().into(), None) else { return Ok(false) };
    let simplify = pipeline::parse("simplify").map_err(|error| error.to_string())?;
    pipeline::run(&simplify, &mut model, &mut PassContext::default(), Price::default())
        .map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
    let again = Model::decode(model.encode().into(), None);
    again.map(|_| true).map_err(|error| format!("what was written can't be read: {:#}", anyhow::Error::from(error)))
}

/// Makes damaged models of good ones.
struct Damage<'a> {
    random: &'a mut Xoshiro256PlusPlus,
    seeds: &'a [Vec<u8>],
}

impl Damage<'_> {
    fn below(&mut self, n: usize) -> usize {
        (self.random.next_u64() % n.max(1) as u64) as usize
    }

    fn pick<'t, T>(&mut self, items: &'t [T]) -> Option<&'t T> {
        items.get(self.below(items.len()))
    }

    fn model(&mut self) -> Vec<u8> {
        let place = self.below(self.seeds.len());
        let mut bytes = self.seeds[place].clone();
        if self.below(4) > 0
            && let Ok(mut model) = ModelProto::decode(&bytes[..])
        {
            for _ in 0..=self.below(4) {
                self.structure(&mut model);
            }
            bytes = model.encode_to_vec();
        }
        if self.below(3) == 0 {
            for _ in 0..=self.below(3) {
                self.bytes(&mut bytes);
            }
        }
        bytes
    }

    fn bytes(&mut self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let (at, other) = (self.below(bytes.len()), self.below(bytes.len()));
        match self.below(4) {
            0 => bytes[at] ^= 1 << self.below(8),
            1 => bytes[at] = self.below(256) as u8,
            2 => bytes.truncate(at),
            _ => {
                let part = bytes[at.min(other)..at.max(other)].to_vec();
                bytes.splice(at..at, part);
            }
        }
    }

    /// A number that is often out of place.
    fn number(&mut self) -> i64 {
        let odd = [0, -1, 1, 2, 3, -2, 7, i64::MAX, i64::MIN, 1 << 31, -(1 << 31), (1 << 40) + 1, 1 << 20];
        self.pick(&odd).copied().unwrap_or(0)
    }

    fn structure(&mut self, model: &mut ModelProto) {
        if self.below(12) == 0 {
            let version = i64::try_from(self.below(28)).ok();
            model.opset_import.iter_mut().for_each(|opset| opset.version = version);
        }
        let other = self.below(self.seeds.len());
        let other = ModelProto::decode(&self.seeds[other][..]).ok().and_then(|model| model.graph);
        if let Some(graph) = &mut model.graph {
            self.graph(graph, other);
        }
    }

    fn graph(&mut self, graph: &mut GraphProto, other: Option<GraphProto>) {
        let node = self.below(graph.node.len());
        let names: Vec<String> = graph
            .node
            .iter()
            .flat_map(|node| node.output.clone())
            .chain(graph.input.iter().map(|input| input.name().to_owned()))
            .chain(graph.initializer.iter().map(|tensor| tensor.name().to_owned()))
            .collect();
        match self.below(9) {
            0 => self.splice(graph, other, &names),
            1 | 2 => self.rewire(graph, node, &names),
            3 => {
                let kinds: Vec<_> =
                    other.iter().flat_map(|graph| &graph.node).map(|node| node.op_type.clone()).collect();
                if let (Some(node), Some(kind)) = (graph.node.get_mut(node), self.pick(&kinds)) {
                    node.op_type.clone_from(kind);
                }
            }
            4 => {
                if let Some(node) = graph.node.get_mut(node) {
                    self.attribute(node);
                }
            }
            5 => {
                let tensor = self.below(graph.initializer.len());
                if let Some(tensor) = graph.initializer.get_mut(tensor) {
                    self.tensor(tensor);
                }
            }
            6 => self.declaration(graph),
            7 => {
                // An operator as a constant's reader, and a chain of two.
                if let (Some(copy), Some(name)) = (graph.node.get(node).cloned(), self.pick(&names)) {
                    let mut copy = copy;
                    copy.input.fill(name.clone());
                    copy.output = copy.output.iter().map(|name| format!("{name}_again")).collect();
                    graph.node.push(copy);
                }
            }
            _ => {
                if node < graph.node.len() && self.below(3) == 0 {
                    graph.node.remove(node);
                } else if let Some(node) = graph.node.get_mut(node) {
                    let slot = self.below(node.input.len());
                    if let Some(input) = node.input.get_mut(slot) {
                        input.clear();
                    }
                }
            }
        }
    }

    /// Has the node at `place` read another value.
    fn rewire(&mut self, graph: &mut GraphProto, place: usize, names: &[String]) {
        let name = self.pick(names).cloned();
        if let (Some(node), Some(name)) = (graph.node.get_mut(place), name) {
            let slot = self.below(node.input.len() + 1);
            match node.input.get_mut(slot) {
                Some(input) => *input = name,
                None => node.input.push(name),
            }
        }
    }

    /// Declares another extent of an input or output.
    fn declaration(&mut self, graph: &mut GraphProto) {
        let place = self.below(graph.input.len() + graph.output.len());
        let value = graph.input.iter_mut().chain(&mut graph.output).nth(place);
        let kind = value.and_then(|value| value.r#type.as_mut()).and_then(|kind| kind.value.as_mut());
        let Some(type_proto::Value::TensorType(tensor)) = kind else { return };
        let Some(shape) = &mut tensor.shape else { return };
        let axis = self.below(shape.dim.len());
        if let Some(dim) = shape.dim.get_mut(axis) {
            dim.value = Some(dimension::Value::DimValue(self.number()));
        }
    }

    /// Puts the nodes of another graph behind those of this one.
    fn splice(&mut self, graph: &mut GraphProto, other: Option<GraphProto>, names: &[String]) {
        let Some(other) = other else { return };
        let renamed = |name: &str| if name.is_empty() { String::new() } else { format!("{name}_other") };
        for mut node in other.node {
            node.output = node.output.iter().map(|name| renamed(name)).collect();
            node.input = node.input.iter().map(|name| renamed(name)).collect();
            graph.node.push(node);
        }
        for mut tensor in other.initializer {
            tensor.name = Some(renamed(tensor.name()));
            graph.initializer.push(tensor);
        }
        let kept: Vec<_> = graph.initializer.iter().map(|tensor| tensor.name().to_owned()).collect();
        for input in other.input.iter().map(|input| renamed(input.name())).filter(|name| !kept.contains(name)) {
            let Some(name) = self.pick(names).cloned() else { continue };
            graph.node.push(NodeProto {
                op_type: Some("Identity".to_owned()),
                input: vec![name],
                output: vec![input],
                ..NodeProto::default()
            });
        }
        graph.output.extend(other.output.into_iter().map(|mut output| {
            output.name = Some(renamed(output.name()));
            output
        }));
    }

    fn attribute(&mut self, node: &mut NodeProto) {
        let place = self.below(node.attribute.len());
        let number = self.number();
        let Some(attribute) = node.attribute.get_mut(place) else { return };
        let AttributeProto { i, ints, f, t, g, .. } = attribute;
        let at = self.below(ints.len());
        if let Some(entry) = ints.get_mut(at) {
            *entry = number;
        } else if let Some(i) = i {
            *i = number;
        } else if let Some(f) = f {
            *f = [0.0, -1.0, f32::NAN, f32::INFINITY, f32::MAX][self.below(5)];
        } else if let Some(t) = t {
            self.tensor(t);
        } else if let Some(g) = g {
            self.graph(g, None);
        }
        if self.below(8) == 0 {
            node.attribute.remove(place);
        }
    }

    fn tensor(&mut self, tensor: &mut TensorProto) {
        let number = self.number();
        match (self.below(3), tensor.raw_data.as_ref().map(|data| data.to_vec())) {
            (0, Some(mut raw)) if raw.len() >= 8 => {
                let at = self.below(raw.len() / 8) * 8;
                raw[at..at + 8].copy_from_slice(&number.to_le_bytes());
                tensor.raw_data = Some(raw.into());
            }
            (1, _) => {
                let axis = self.below(tensor.dims.len());
                if let Some(dim) = tensor.dims.get_mut(axis) {
                    *dim = number;
                }
            }
            // The same elements in another shape.
            (_, Some(_)) => {
                let count: i64 = tensor.dims.iter().fold(1, |n: i64, &d| n.saturating_mul(d));
                let mut shapes = vec![vec![count], vec![1, count], vec![count, 1, 1], vec![]];
                tensor.dims = shapes.swap_remove(self.below(4));
            }
            _ => {
                let at = self.below(tensor.int64_data.len());
                if let Some(entry) = tensor.int64_data.get_mut(at) {
                    *entry = number;
                }
            }
        }
    }
}
