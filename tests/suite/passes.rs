//! Each pass on the fixtures that state what it does: what it changed is a snapshot, what it computes is checked.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    path::Path,
};

use onnx_shrink::{
    analysis::validity,
    codec::Model,
    pass::{Context, Fidelity, Price},
    passes::PASSES,
    pipeline::{self, Item},
    text,
    verify::{Difference, Engine, ROUNDING_BUDGET, Reference, Request, Samples, Split},
};

use crate::fixtures;

/// What a fixture says in its comments.
struct Claim {
    model: Model,
    passes: Vec<Item>,
    /// The most that the error may be; without it, only rounding may change.
    error: Option<f64>,
}

fn read(path: &Path) -> Claim {
    let text = std::fs::read_to_string(path).unwrap();
    let mut comments = text.lines().filter_map(|line| line.strip_prefix("# "));
    let passes = pipeline::parse(comments.next().unwrap()).unwrap();
    let passes = passes.into_iter().filter(|item| matches!(item, Item::Pass(_))).collect();
    let error = comments.find_map(|line| line.strip_prefix("error at most ")).map(|error| error.parse().unwrap());
    let model = text::parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Claim { model, passes, error }
}

/// Runs both models at a batch of `batch` and compares.
fn compare(before: &Model, after: &Model, batch: usize) -> Difference {
    let shape = |info: &onnx_shrink::ir::Input| {
        let dims = onnx_shrink::analysis::shapes::Fact::declared(&info.info).extents().unwrap();
        let dims = dims.iter().enumerate().map(|(axis, dim)| dim.unwrap_or(if axis == 0 { batch } else { 3 }));
        (info.info.name().to_owned(), dims.collect())
    };
    let shapes: BTreeMap<_, Vec<usize>> = before.graph.fed_inputs().map(shape).collect();
    let samples = Samples::gather(before, &Request { shapes, ..Request::default() }).unwrap();
    assert_eq!(samples.unrunnable, None);
    Reference::new(&Engine::default(), before, samples.part(Split::Last)).unwrap().compare(after).unwrap()
}

#[test]
fn every_fixture_of_a_pass_keeps_its_claim() {
    for pass in PASSES {
        let claims: Vec<_> = fixtures(&format!("passes/{}", pass.name)).into_iter().collect();
        let claims: Vec<_> = claims.iter().filter(|path| path.extension().is_some_and(|e| e == "onnxtxt")).collect();
        assert!(!claims.is_empty(), "{} has no fixture", pass.name);
        for path in claims {
            let Claim { model, passes, error } = read(path);
            let mut after = model.clone();
            let bound = Samples::likely_shapes(&model, &Request::default());
            let mut cx = Context::at(bound);
            let outcomes = pipeline::run(&passes, &mut after, &mut cx, Price::default()).unwrap();
            let mut snapshot = String::new();
            for outcome in &outcomes {
                let did: Vec<_> = outcome.tally.iter().map(|(what, n)| format!("{n} {what}")).collect();
                let did = if did.is_empty() { "nothing to do".to_owned() } else { did.join(", ") };
                writeln!(snapshot, "{}: {did}", outcome.pass).unwrap();
                outcome.declined.iter().for_each(|why| writeln!(snapshot, "declined {why}").unwrap());
            }
            write!(snapshot, "\n{}", text::diff(&model, &after).lines).unwrap();
            insta::with_settings!({
                snapshot_path => path.parent().unwrap(),
                prepend_module_to_snapshot => false,
                omit_expression => true,
                snapshot_suffix => "",
            }, {
                insta::assert_snapshot!(path.file_stem().unwrap().to_str().unwrap(), snapshot);
            });
            for batch in [1, 2] {
                let difference = compare(&model, &after, batch);
                let fits = match error {
                    Some(error) => difference.error <= error,
                    None => difference.rounding <= ROUNDING_BUDGET,
                };
                assert!(fits, "{}: {difference:?}", path.display());
                assert!(error.is_none() || pass.fidelity == Fidelity::Lossy, "{}", path.display());
            }
            let mut twice = Model::decode(after.encode().into(), None).unwrap();
            for model in [&model, &twice] {
                assert_eq!(validity::faults(&model.graph), BTreeSet::new(), "{}", path.display());
            }
            twice.raise();
            if pass.fidelity != Fidelity::Lossy {
                pipeline::run(&passes, &mut twice, &mut Context::default(), Price::default()).unwrap();
                assert_eq!(twice.graph.edits(), 0, "{}: a second run changed something", path.display());
            }
        }
    }
}

#[test]
fn what_is_not_known_is_not_taken_for_absent() {
    let head = "<ir_version: 8, opset_import: [\"\": 17]>\n";
    for (why, graph) in [
        (
            "the axis may be the other one",
            "g (float[2,3] x, int64[1] axis) => (float[N,M] y)\n<int64[1] begin = {0}, int64[1] end = {2}>\n\
             {\n a = Slice (x, begin, end, axis)\n y = Relu (a)\n}\n",
        ),
        (
            "a caller may feed another k",
            "g (float[4] x, int64[1] k) => (float[N] y)\n<int64[1] k = {2}>\n\
             {\n kk = Mul (k, k)\n n = Cast <to = 1> (kk)\n y = Mul (x, n)\n}\n",
        ),
        (
            "the empty list of axes may stand for all",
            "g (float[2,1,3,1] x) => (float[N,M] y)\n<int64[0] axes = {}>\n{\n a = Squeeze (x, axes)\n y = Relu (a)\n}\n",
        ),
        (
            "of no elements there may be any number of rows",
            "g (float[N,0] x, int64[2] shape) => (float[M,0] y)\n<int64[2] to = {5, 0}>\n\
             {\n a = Reshape <allowzero = 1> (x, to)\n y = Relu (a)\n}\n",
        ),
        (
            "the steps may be negative",
            "g (float[2,3] x, int64[1] steps) => (float[N,M] y)\n\
             <int64[1] begin = {0}, int64[1] end = {2}, int64[1] axes = {0}>\n\
             {\n a = Slice (x, begin, end, axes, steps)\n y = Relu (a)\n}\n",
        ),
    ] {
        let mut model = text::parse(&format!("{head}{graph}")).unwrap();
        let before = model.graph.ops().len();
        let simplify = pipeline::parse("simplify").unwrap();
        pipeline::run(&simplify, &mut model, &mut Context::default(), Price::default()).unwrap();
        assert_eq!(model.graph.ops().len(), before, "{why}: {}", text::print(&model));
    }
}
