//! Storage forms: what is written is what is read back, bit for bit, whoever wrote it.

use std::collections::BTreeMap;

use onnx_shrink::{
    codec::{Model, Runtime},
    eval,
    ir::{Affine, Codebook, Codes, DType, Graph, Kind, Storage, Tensor, Vectors, Weight},
    pass::{Context, Price},
    pipeline,
    shrink::{Job, shrink},
    text,
};
use proptest::{prelude::*, test_runner::RngSeed};

use crate::{fixture, fixtures};

/// A weight in some storage form, and the graph that it is written in.
#[derive(Clone, Debug)]
struct Case {
    dims: Vec<usize>,
    tile: Vec<usize>,
    dtype: DType,
    bits: u32,
    is_table: bool,
    is_signed: bool,
    has_zeros: bool,
    opset: i64,
    is_generic: bool,
    is_multiplied: bool,
    seed: u64,
}

impl Case {
    /// Numbers below `most`, the same for equal cases.
    fn numbers(&self, count: usize, most: u64) -> impl Iterator<Item = u64> {
        let mut state = self.seed | 1;
        (0..count).map(move |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % most
        })
    }

    fn weight(&self) -> Option<Weight> {
        let count = self.dims.iter().product();
        let codes: Vec<u64> = self.numbers(count, 1 << self.bits).collect();
        let half = 1_u64 << (self.bits - 1);
        let is_signed = self.is_signed && !self.is_table;
        let byte = |&code: &u64| if is_signed { (code as u8).wrapping_sub(half as u8) } else { code as u8 };
        let bytes: Vec<u8> = codes.iter().map(byte).collect();
        let codes = Codes::new(&self.dims, self.bits, &self.tile, bytes.into())?;
        let (mut grid, tiles) = (codes.grid(), codes.grid().iter().product::<usize>());
        let floats = |count: usize| self.numbers(count, 1000).map(|n| n as f64 / 512.0 - 0.9).collect::<Vec<_>>();
        if self.is_table {
            grid.push(1 << self.bits);
            let tables = Tensor::floats(self.dtype, &grid, &floats(tiles << self.bits))?;
            return Weight::stored(Storage::Codebook(Codebook::new(codes, tables)?));
        }
        let zeros: Vec<i64> = (0..tiles as i64).map(|i| (i + 1) % 2).collect();
        let zeros = self.has_zeros.then(|| Tensor::integers(DType::Int32, &grid, &zeros)).flatten();
        let scales = Tensor::floats(self.dtype, &grid, &floats(tiles))?;
        let form = Affine::new(codes, is_signed, scales, zeros)?;
        Weight::stored(Storage::Affine(if self.is_multiplied { form.to_multiply_by() } else { form }))
    }

    /// A model that reads the weight.
    fn model(&self) -> Option<Model> {
        let dims: Vec<_> = self.dims.iter().map(ToString::to_string).collect();
        let dtype = self.dtype.as_str_name().to_lowercase();
        let op = if self.dims.len() == 2 { "MatMul" } else { "Add" };
        let text = format!(
            "<ir_version: 13, opset_import: [\"\": {}]>\ng ({dtype}[?] x) => ({dtype}[?] y)\n<{dtype}[{}] w = normal(1), {dtype}[1] b = {{0.5}}>\n\
             {{\n m = {op} (x, w)\n a = Add (m, b)\n y = Relu (a)\n}}\n",
            self.opset,
            dims.join(",")
        );
        let mut model = text::parse(&text).unwrap();
        let value = model.graph.values()["w"];
        model.graph.set_weight(value, self.weight()?);
        model.runtime = if self.is_generic { Runtime::Generic } else { Runtime::Onnxruntime };
        Some(model)
    }
}

prop_compose! {
    fn cases()(
        axes in prop::collection::vec((1_usize..9, 0_usize..4), 1..5),
        (dtype, bits) in (0_usize..3, 0_usize..5),
        flags in any::<(bool, bool, bool, bool, bool)>(),
        (opset, seed) in (0_usize..6, any::<u64>()),
    ) -> Case {
        let is_table = flags.0;
        let widths: &[u32] = if is_table { &[1, 2, 3, 4, 8] } else { &[2, 4, 8] };
        let tile = |&(extent, cut): &(usize, usize)| match cut {
            0 => extent,
            1 => 1,
            cut => cut.min(extent),
        };
        Case {
            tile: axes.iter().map(tile).collect(),
            dims: axes.iter().map(|axis| axis.0).collect(),
            dtype: [DType::Float, DType::Double, DType::Float16][dtype],
            bits: widths[bits % widths.len()],
            is_table,
            is_signed: flags.1,
            has_zeros: flags.2,
            opset: [7, 10, 11, 13, 21, 25][opset],
            is_generic: flags.3,
            is_multiplied: flags.4,
            seed,
        }
    }
}

fn weight(model: &Model, name: &str) -> Weight {
    model.graph.weight(model.graph.values()[name]).cloned().unwrap_or_else(|| panic!("`{name}` is no constant"))
}

pub(crate) fn operators(graph: &Graph) -> Vec<&str> {
    graph.ops().into_iter().filter_map(|id| Some(graph.op(id)?.op_type())).collect()
}

/// What the constants of `graph` make of each other, operator by operator.
fn evaluated(graph: &Graph) -> BTreeMap<String, Tensor> {
    let mut known: BTreeMap<String, Tensor> = BTreeMap::new();
    for id in graph.order() {
        let value = match graph.kind(id) {
            Kind::Const(_) => graph.constant(id.out()).cloned(),
            Kind::Op(op) => {
                let inputs: Vec<_> =
                    graph.operands(id).into_iter().map(|value| known.get(graph.name(value.unwrap()))).collect();
                let is_constant = inputs.iter().all(Option::is_some);
                is_constant
                    .then(|| eval::evaluate(op, graph.opset(), &inputs))
                    .flatten()
                    .and_then(|mut made| made.pop())
            }
            _ => None,
        };
        known.extend(value.map(|value| (graph.name(id.out()).to_owned(), value)));
    }
    known
}

/// Both take the same tiles, codes, and scales or tables.
fn is_same_form(a: &Storage, b: &Storage) -> bool {
    let (Some(x), Some(y)) = (a.codes(), b.codes()) else { return false };
    let are_codes = (x.dims(), x.bits(), x.tile(), x.bytes()) == (y.dims(), y.bits(), y.tile(), y.bytes());
    let parts = match (a, b) {
        (Storage::Affine(a), Storage::Affine(b)) => {
            let zeros = match (a.zeros(), b.zeros()) {
                (Some(a), Some(b)) => a.same(b),
                (a, b) => a.is_none() && b.is_none(),
            };
            zeros && a.scales().same(b.scales()) && a.is_signed() == b.is_signed()
        }
        (Storage::Codebook(a), Storage::Codebook(b)) => a.tables().same(b.tables()),
        _ => false,
    };
    are_codes && parts
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, rng_seed: RngSeed::Fixed(6), ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read_back_bit_for_bit(case in cases()) {
        // A scale for each element is no storage.
        let model = case.model();
        prop_assume!(model.is_some());
        let model = model.unwrap();
        let stored = weight(&model, "w");
        let file = Model::decode(model.encode().into(), None).unwrap();
        let known = evaluated(&file.graph);
        // Arithmetic in half precision is not evaluated.
        if case.dtype != DType::Float16 {
            prop_assert!(known["w"].same(stored.value()), "evaluated op by op");
        }
        let mut restored = file;
        restored.raise();
        let raised = weight(&restored, "w");
        prop_assert!(raised.value().same(stored.value()), "the value");
        let divides = case.dims.iter().zip(&case.tile).all(|(extent, tile)| extent.is_multiple_of(*tile));
        let is_packed = case.bits < 8 || case.is_table;
        let spans: Vec<_> = (0..case.dims.len()).filter(|&axis| case.tile[axis] > 1).collect();
        // Tables are found along one axis.
        let is_whole = case.dims == case.tile;
        let is_in_line = spans.windows(2).all(|pair| (pair[0] + 1..=pair[1]).all(|axis| case.tile[axis] == case.dims[axis]));
        if divides && (case.opset >= 11 || !is_packed) && (!case.is_table || is_whole || is_in_line) {
            prop_assert!(raised.is_stored(), "is spelled");
            prop_assert_eq!(operators(&restored.graph), operators(&model.graph), "what is beside it");
            prop_assert!(is_same_form(raised.storage(), stored.storage()), "{:?} {:?}", raised.storage(), stored.storage());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, rng_seed: RngSeed::Fixed(6), ..ProptestConfig::default() })]

    #[test]
    fn vectors_are_read_back_bit_for_bit(
        (rows, columns, width) in (1_usize..7, 1_usize..7, 1_usize..5),
        (bits, turned, opset) in (0_usize..5, any::<bool>(), 0_usize..2),
        seed in any::<u64>(),
    ) {
        let (bits, opset) = ([1, 2, 3, 4, 8][bits], [11, 21][opset]);
        let dims = if turned { vec![rows * width, columns] } else { vec![rows, columns * width] };
        let case = Case { dims, tile: vec![1, 1], dtype: DType::Float, bits, is_table: true, is_signed: false, has_zeros: false,
            opset, is_generic: false, is_multiplied: false, seed };
        let bytes: Vec<u8> = case.numbers(rows * columns, 1 << bits).map(|code| code as u8).collect();
        let codes = Codes::new(&[rows, columns], bits, &[rows, columns], bytes.into()).unwrap();
        let table: Vec<f64> = case.numbers(width << bits, 1000).map(|n| n as f64 / 512.0 - 0.9).collect();
        let table = Tensor::floats(DType::Float, &[1 << bits, width], &table).unwrap();
        let form = Vectors::new(codes, table, &case.dims, turned).unwrap();
        let weight = Weight::stored(Storage::Vectors(form)).unwrap();
        let mut model = case.model().unwrap();
        let value = model.graph.values()["w"];
        model.graph.set_weight(value, weight.clone());
        let mut file = Model::decode(model.encode().into(), None).unwrap();
        prop_assert!(evaluated(&file.graph)["w"].same(weight.value()), "evaluated op by op");
        file.raise();
        let raised = self::weight(&file, "w");
        prop_assert!(raised.value().same(weight.value()) && raised.is_stored());
        let along = usize::from(turned);
        for moved in [raised.permute(&[1, 0]), raised.select(along, &[0]), raised.reshape(&[case.dims[0], 1, case.dims[1]])] {
            let moved = moved.unwrap();
            prop_assert!(moved.is_stored());
            prop_assert!(Weight::stored(moved.storage().clone()).unwrap().value().same(moved.value()));
        }
        prop_assert!(raised.permute(&[1, 0]).unwrap().value().same(&weight.value().permute(&[1, 0]).unwrap()));
    }
}

#[test]
fn a_stored_weight_that_is_moved_is_stored_in_what_is_written_at_once() {
    let text = "<ir_version: 10, opset_import: [\"\": 21]>\ng (float[N,8] x) => (float[N,6] y)\n\
                <float[6,8] w = normal(1), float[1] a = {1.0}, float[1] b = {2.0}>\n\
                {\n t = Transpose <perm = [1, 0]> (w)\n c = Add (a, b)\n m = MatMul (x, t)\n y = Add (m, c)\n}\n";
    let mut model = text::parse(text).unwrap();
    let value = model.graph.values()["w"];
    model.graph.set_weight(value, coded(4, &[6, 1]));
    let items = pipeline::parse("fold-constants").unwrap();
    pipeline::run(&items, &mut model, &mut Context::default(), Price::default()).unwrap();
    let mut file = Model::decode(model.encode().into(), None).unwrap();
    file.raise();
    let moved = weight(&file, "t");
    assert!(moved.is_stored(), "{}", text::diff(&model, &file));
    assert!(moved.value().same(coded(4, &[6, 1]).permute(&[1, 0]).unwrap().value()));
}

/// A weight of a few values, half of them negative.
fn coded(bits: u32, tile: &[usize]) -> Weight {
    let case = Case {
        dims: vec![6, 8],
        tile: tile.to_vec(),
        dtype: DType::Float,
        bits,
        is_table: false,
        is_signed: true,
        has_zeros: true,
        opset: 21,
        is_generic: false,
        is_multiplied: false,
        seed: 5,
    };
    case.weight().unwrap()
}

#[test]
fn slices_shapes_and_orders_of_stored_weights_are_exact() {
    for tile in [[6, 8], [1, 8], [6, 1], [2, 1], [1, 4], [3, 4]] {
        for bits in [2, 4, 8] {
            let weight = coded(bits, &tile);
            let selected = weight.select(0, &[0, 1, 4, 5]).unwrap();
            assert!(selected.is_stored());
            assert!(selected.value().same(&weight.value().select(0, &[0, 1, 4, 5]).unwrap()));
            let turned = weight.permute(&[1, 0]).unwrap();
            assert!(turned.is_stored() && turned.value().same(&weight.value().permute(&[1, 0]).unwrap()));
            let shaped = weight.reshape(&[2, 3, 8]).unwrap();
            assert!(shaped.value().same(&weight.value().reshape(&[2, 3, 8]).unwrap()));
            // Blocks of two rows are none of three.
            assert_eq!(shaped.is_stored(), tile[0] != 2);
            // What they own still stands for what they say.
            for weight in [selected, turned, shaped].iter().filter(|weight| weight.is_stored()) {
                assert!(Weight::stored(weight.storage().clone()).unwrap().value().same(weight.value()));
            }
        }
    }
}

#[test]
fn a_row_times_a_factor_keeps_its_codes() {
    let weight = coded(4, &[1, 8]);
    let values: Vec<f64> = weight.value().f64s().unwrap();
    let scaled: Vec<f64> =
        values.iter().enumerate().map(|(i, v)| v * [2.0, -0.5, 1.0, 4.0, 0.25, 8.0][i / 8]).collect();
    let fitted = weight.fit(&[6, 8], &scaled).unwrap();
    assert_eq!(fitted.storage().codes().unwrap().bytes(), weight.storage().codes().unwrap().bytes());
    assert_eq!(fitted.value().f64s().unwrap(), scaled);
}

#[test]
fn what_other_tools_quantized_is_understood() {
    for path in fixtures("quantized").iter().filter(|path| path.extension().is_some_and(|e| e == "onnx")) {
        let file = Model::open(path).unwrap();
        let wanted = Model::open(&path.with_extension("values")).unwrap();
        let mut model = file.clone();
        // What is quantized at run time is quantized first.
        pipeline::run(
            &pipeline::parse("fold-constants").unwrap(),
            &mut model,
            &mut Context::default(),
            Price::default(),
        )
        .unwrap();
        model.raise();
        let mut again = Model::decode(model.encode().into(), None).unwrap();
        again.raise();
        for (name, value) in wanted.graph.values() {
            let Some(value) = wanted.graph.constant(value).filter(|value| value.len() > 64) else { continue };
            for model in [&model, &again] {
                let weight = weight(model, name);
                assert!(weight.is_stored(), "{} {name}", path.display());
                assert!(weight.value().same(value), "{} {name}", path.display());
            }
        }
        let job = Job { items: pipeline::parse("simplify").unwrap(), ..Job::default() };
        let (small, report) = shrink(&file, &job, &mut |_| {}).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(report.after.bytes <= report.before.bytes, "{}", path.display());
        let (_, report) = shrink(&Model::decode(small.encode().into(), None).unwrap(), &job, &mut |_| {}).unwrap();
        assert_eq!(report.before.bytes, report.after.bytes, "{}", path.display());
    }
}

#[test]
fn a_stored_model_is_as_small_as_predicted_and_a_second_run_changes_nothing() {
    let model = Model::open(&fixture("models/mnist_lenet300.onnx")).unwrap();
    for passes in [
        "quantize:bits=8",
        "quantize:bits=4",
        "codebook:bits=3",
        "quantize:bits=2:block=28",
        "codebook:bits=4:vector=4",
        "prune:ratio=0.5,svd:rank=16,quantize:bits=8",
    ] {
        for runtime in [Runtime::Onnxruntime, Runtime::Generic] {
            let job = |passes: &str| Job {
                items: pipeline::parse(passes).unwrap(),
                verify: false,
                runtime,
                ..Job::default()
            };
            let (small, report) = shrink(&model, &job(passes), &mut |_| {}).unwrap();
            let bytes = small.encode();
            assert_eq!(bytes.len(), report.after.bytes, "{passes}");
            let file = Model::decode(bytes.into(), None).unwrap();
            let is_float = |id| file.graph.constant(id).is_some_and(|t| t.dtype() == DType::Float && t.len() > 10_000);
            assert!(!file.graph.node_ids().any(|id| is_float(id.out())), "{passes}: a float copy is left");
            for again in ["simplify", passes] {
                if again.contains("svd") {
                    continue;
                }
                let (second, _) = shrink(&file, &job(again), &mut |_| {}).unwrap();
                assert_eq!(second.graph.edits(), 0, "{passes}, then {again}: {}", text::diff(&file, &second));
            }
        }
    }
}

#[test]
fn parts_that_do_not_fit_together_are_no_weight() {
    let graph = |parts: &str, node: &str| {
        let text = format!(
            "<ir_version: 10, opset_import: [\"\": 21]>\ng (float[1,2] x) => (float[1,4] y)\n\
             <int8[2,4] q = {{1, -2, 3, 4, 5, 6, 7, 8}}, {parts}>\n{{\n w = {node}\n r = Abs (w)\n y = MatMul (x, r)\n}}\n"
        );
        text::parse(&text).unwrap()
    };
    let along = "DequantizeLinear <axis = 1> (q, s, z)";
    let whole = "float[4] s = {1.0, 2.0, 3.0, 4.0}, int8[4] z = {0, 1, 2, 3}";
    for (parts, node, is_weight) in [
        (whole, along, true),
        ("float[4] s = {1.0, 2.0, 3.0, 4.0}, int8[2] z = {1, 2}", along, false),
        ("float[4] s = {1.0, 2.0, 3.0, 4.0}, int8[5] z = {1, 2, 3, 4, 5}", along, false),
        ("float[3] s = {1.0, 2.0, 3.0}, int8[3] z = {1, 2, 3}", along, false),
        (whole, "DequantizeLinear <axis = 5> (q, s, z)", false),
        (whole, "DequantizeLinear <axis = 1, block_size = 3> (q, s, z)", false),
        (
            "float[2,2] s = {1.0, 2.0, 3.0, 4.0}, int8[2] z = {1, 2}",
            "DequantizeLinear <axis = 1, block_size = 2> (q, s, z)",
            false,
        ),
        (
            "float[4,1] s = {1.0, 2.0, 3.0, 4.0}, int8[4,1] z = {1, 2, 3, 4}",
            "DequantizeLinear <axis = 1, block_size = 2> (q, s, z)",
            false,
        ),
        ("float[0] s = {}, int8[0] z = {}", along, false),
    ] {
        let mut model = graph(parts, node);
        model.raise();
        let is_stored = model.graph.weight(model.graph.values()["w"]).is_some_and(Weight::is_stored);
        assert_eq!(is_stored, is_weight, "{parts}: {node}");
        assert_eq!(evaluated(&graph(parts, node).graph).contains_key("w"), is_weight, "{parts}: {node}");
    }
}

#[test]
fn products_by_codes_leave_alone_what_is_kept_and_are_paid_for() {
    let text = "<ir_version: 8, opset_import: [\"\": 17]>\ng (float[1,512] x) => (float[1,512] y)\n\
                <float[512,512] w = normal(1), float[512,512] v = normal(2)>\n{\n [first] h = MatMul (x, w)\n s = Tanh (h)\n y = MatMul (s, v)\n}\n";
    let model = text::parse(text).unwrap();
    let products = |model: &Model, job: &Job| {
        let (small, report) = shrink(model, job, &mut |_| {}).unwrap();
        let file = Model::decode(small.encode().into(), None).unwrap();
        let products = operators(&file.graph).into_iter().filter(|op| *op == "DequantizeLinear").count();
        (file, report.after.bytes * 3 < report.before.bytes, products)
    };
    let job = |passes: &str| Job { items: pipeline::parse(passes).unwrap(), verify: false, ..Job::default() };
    assert!(matches!(products(&model, &job("quantize:bits=8")), (_, true, 2)));
    // What is stored already, by a pass that makes no such products, may be multiplied by.
    let (mut table, _, none) = products(&model, &job("codebook:bits=8"));
    assert_eq!(none, 0);
    for (name, step) in [("w", 7), ("v", 5)] {
        let bytes: Vec<u8> = (0..512_usize * 512).map(|i| (i * i / step % 251) as u8).collect();
        let codes = Codes::new(&[512, 512], 8, &[512, 1], bytes.into()).unwrap();
        let scales = Tensor::floats(DType::Float, &[1, 512], &[0.5; 512]).unwrap();
        let form = Affine::new(codes, true, scales, None).unwrap();
        table.raise();
        let value = table.graph.values()[name];
        table.graph.set_weight(value, Weight::stored(Storage::Affine(form)).unwrap());
    }
    let keep = |name: &str| Job { keep: vec![globset::Glob::new(name).unwrap()], ..job("quantize:bits=8") };
    assert_eq!(products(&table, &job("quantize:bits=8")).2, 2);
    assert_eq!(products(&table, &keep("first")).2, 1);
    assert_eq!(products(&table, &keep("[wv]")).2, 0);
    // Where there is room for what eight bits lose, and none for what rounding what they multiply does, they are made floats of.
    let within = |budget: f64| Job { max_error: Some(budget), verify: true, ..job("quantize") };
    assert!(matches!(products(&model, &within(0.001)), (_, false, 0)));
    assert!(matches!(products(&model, &within(0.024)), (_, true, 0)));
    assert!(matches!(products(&model, &within(0.1)), (_, true, 2)));
}

#[test]
fn halves_that_integers_are_made_floats_of_for_are_quantized() {
    let text = "<ir_version: 8, opset_import: [\"\": 17]>\ng (float[N,64] x) => (float[N,48] y)\n\
                <float16[64,48] h = normal(1), float s = {0.05}, int8 z = {0}>\n\
                {\n q = QuantizeLinear (x, s, z)\n d = DequantizeLinear (q, s, z)\n w = Cast <to = 1> (h)\n y = MatMul (d, w)\n}\n";
    let model = text::parse(text).unwrap();
    let job = Job { items: pipeline::parse("quantize:bits=8").unwrap(), verify: false, ..Job::default() };
    let (small, _) = shrink(&model, &job, &mut |_| {}).unwrap();
    assert_eq!(weight(&small, "w").storage().codes().map(Codes::bits), Some(8));
}
