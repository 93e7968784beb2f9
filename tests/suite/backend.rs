//! A sample of the ONNX backend suite: every operator that ONNX Runtime runs, at its oldest and its newest operator set.

use std::collections::BTreeSet;

use onnx_shrink::{
    analysis::validity,
    codec::Model,
    pass::{Context, Price},
    pipeline,
    verify::{Engine, ROUNDING_BUDGET, Reference, Request, Samples, Split},
};

use crate::fixtures;

#[test]
fn what_fuzzing_found_is_answered_with_a_model_or_an_error() {
    let simplify = pipeline::parse("simplify").unwrap();
    for path in fixtures("fuzz") {
        let Ok(mut model) = Model::open(&path) else { continue };
        let done = pipeline::run(&simplify, &mut model, &mut Context::default(), Price::default());
        assert!(done.is_ok(), "{}: {:?}", path.display(), done.err());
        assert!(Model::decode(model.encode().into(), None).is_ok(), "{}", path.display());
    }
}

#[test]
fn every_operator_computes_the_same_after_simplification() {
    let simplify = pipeline::parse("simplify").unwrap();
    let (mut changed, mut compared) = (0, 0);
    let files = fixtures("backend");
    assert!(files.len() >= 150, "{}", files.len());
    for path in files {
        let model = Model::open(&path).unwrap();
        let mut simple = model.clone();
        pipeline::run(&simplify, &mut simple, &mut Context::default(), Price::default()).unwrap();
        let mut twice = Model::decode(simple.encode().into(), None).unwrap();
        pipeline::run(&simplify, &mut twice, &mut Context::default(), Price::default()).unwrap();
        assert_eq!(twice.graph.edits(), 0, "{}: a second run changed something", path.display());
        // A known value in the place of what computes it may take a few bytes more.
        let removed = model.graph.ops().len().saturating_sub(simple.graph.ops().len());
        let most = model.encode().len() + 64 * removed;
        assert!(simple.encode().len() <= most, "{}: it is larger", path.display());
        for model in [&model, &twice] {
            assert_eq!(validity::faults(&model.graph), BTreeSet::new(), "{}", path.display());
        }
        changed += usize::from(simple.graph.edits() > 0);
        // What the engine can't run, or can't be fed, was compared in ONNX Runtime when the sample was taken.
        let Ok(samples) = Samples::gather(&model, &Request::default()) else { continue };
        let reference = Reference::new(&Engine::default(), &model, samples.part(Split::Last));
        let Ok(reference) = reference else { continue };
        let Ok(difference) = reference.compare(&simple) else { continue };
        assert!(difference.rounding <= ROUNDING_BUDGET, "{}: {difference:?}", path.display());
        compared += 1;
    }
    assert!(changed >= 100, "{changed} changed");
    assert!(compared >= 150, "{compared} compared");
}
