//! Mutations of a [`Graph`]. Each counts as an edit; names of the interface survive all of them.

use std::collections::{BTreeMap, HashSet};

use petgraph::{Direction, visit::EdgeRef};

use super::{Body, Const, DType, Graph, Inlet, Input, Kind, Node, NodeId, Op, Origin, Outlet, Output, Weight, Wire};
use crate::proto::{TypeProto, ValueInfoProto, tensor_shape_proto::dimension, type_proto};

/// `base`, or the first of `base.2`, `base.3`, … that is not `taken`.
pub(crate) fn fresh(base: &str, mut taken: impl FnMut(&str) -> bool) -> String {
    if !base.is_empty() && !taken(base) {
        return base.to_owned();
    }
    (2..).map(|n| format!("{base}.{n}")).find(|name| !taken(name)).unwrap_or_default()
}

impl Graph {
    /// An empty graph over version `opset` of the standard operators.
    #[must_use]
    pub fn new(opset: i64) -> Self {
        Self { opset, ..Self::default() }
    }

    /// Adds a node as a file has it: with these names, at this place.
    pub(crate) fn add_node(&mut self, kind: Kind, outputs: Vec<String>, position: u64) -> NodeId {
        self.names.extend(outputs.iter().filter(|name| !name.is_empty()).cloned());
        NodeId(self.dag.add_node(Node { kind, outputs, position, gone: false }))
    }

    /// Wires `value` into `inlet` of `node`, which is free.
    pub(crate) fn wire(&mut self, value: Outlet, node: NodeId, inlet: Inlet) {
        self.dag.add_edge(value.node.0, node.0, Wire { from: value.slot, to: inlet });
    }

    /// A name like `base` that no value has or had.
    #[must_use]
    pub fn fresh_name(&self, base: &str) -> String {
        fresh(base, |name| self.names.contains(name))
    }

    /// A name for what is made of `value` and called `what`: that of `value`, and `what` once.
    #[must_use]
    pub fn name_after(&self, value: Outlet, what: &str) -> String {
        let suffix = format!(".{what}");
        let mut base = self.name(value);
        loop {
            // It may be numbered.
            let bare = base.trim_end_matches(|c: char| c.is_ascii_digit()).strip_suffix('.').unwrap_or(base);
            let Some(shorter) = base.strip_suffix(&suffix).or(bare.strip_suffix(&suffix)) else { break };
            base = shorter;
        }
        format!("{base}{suffix}")
    }

    /// Adds an operator fed by `operands`, that makes values called `names` or like it, at the place of `near`.
    pub fn add_op(&mut self, mut op: Op, operands: &[Option<Outlet>], names: &[&str], near: NodeId) -> NodeId {
        self.edits += 1;
        op.arity = operands.len();
        if !op.name().is_empty() {
            let taken = |name: &str| self.node_ids().any(|id| self.op(id).is_some_and(|op| op.name() == name));
            let name = fresh(op.name(), taken);
            op = op.named(&name);
        }
        let mut outputs = Vec::with_capacity(names.len());
        for name in names {
            let name = self.fresh_name(name);
            self.names.insert(name.clone());
            outputs.push(name);
        }
        let id = self.add_node(Kind::Op(Box::new(op)), outputs, self.dag[near.0].position);
        for (slot, operand) in (0..).zip(operands) {
            if let Some(operand) = operand {
                self.wire(*operand, id, Inlet::Slot(slot));
            }
        }
        id
    }

    /// Adds an initializer called `name` or like it.
    pub fn add_const(&mut self, weight: Weight, name: &str) -> Outlet {
        self.edits += 1;
        let name = self.fresh_name(name);
        let constant = Const { weight, origin: Origin::Initializer, overridable: false };
        self.add_node(Kind::Const(constant), vec![name], u64::MAX).out()
    }

    /// Declares an input or a constant an input of the graph.
    pub(crate) fn push_input(&mut self, node: NodeId, info: ValueInfoProto) {
        if let Kind::Const(constant) = &mut self.dag[node.0].kind {
            constant.overridable = true;
        }
        self.inputs.push(Input { node, info });
    }

    /// Declares `value` an output of the graph; `info` carries its name.
    pub(crate) fn push_output(&mut self, value: Outlet, info: ValueInfoProto) {
        self.outputs.push(Output { value, info });
    }

    /// No longer lists constants as inputs, so that nobody can override them; says how many there were.
    pub fn unlist_default_values(&mut self) -> usize {
        let before = self.inputs.len();
        let dag = &mut self.dag;
        self.inputs.retain(|input| match &mut dag[input.node.0].kind {
            Kind::Const(constant) => {
                constant.overridable = false;
                false
            }
            _ => true,
        });
        self.edits += (before - self.inputs.len()) as u64;
        before - self.inputs.len()
    }

    /// Has everything that reads `old` read `new` instead. Where `old` is a graph output, `new` takes its name; where
    /// `new` can't be renamed (an input, a constant, another output, or a name that annotations mention), an `Identity`
    /// carries it.
    pub fn replace_uses(&mut self, old: Outlet, new: Outlet) {
        if old == new {
            return;
        }
        self.edits += 1;
        let moved: Vec<_> = self
            .dag
            .edges_directed(old.node.0, Direction::Outgoing)
            .filter(|edge| edge.weight().from == old.slot)
            .map(|edge| (edge.id(), NodeId(edge.target()), edge.weight().to))
            .collect();
        for (edge, target, to) in moved {
            self.dag.remove_edge(edge);
            self.wire(new, target, to);
        }
        if !self.is_output(old) {
            return;
        }
        let name = self.name(old).to_owned();
        let retired = self.fresh_name(&format!("{name}.replaced"));
        self.rename(old, retired);
        let carrier = if self.can_take_name(new) {
            new
        } else {
            let identity = Op { arity: 1, ..Op::new("Identity") };
            let id = self.add_node(Kind::Op(Box::new(identity)), vec![String::new()], self.dag[old.node.0].position);
            self.wire(new, id, Inlet::Slot(0));
            id.out()
        };
        self.rename(carrier, name);
        for output in &mut self.outputs {
            if output.value == old {
                output.value = carrier;
            }
        }
    }

    /// Whether `value` can become the value of a graph output: it is an operator's, and its own name is not needed.
    #[must_use]
    pub fn can_take_name(&self, value: Outlet) -> bool {
        self.op(value.node).is_some() && !self.is_output(value) && !self.is_pinned(value)
    }

    /// Makes `node`, an operator with one result or a captured value, the constant `weight` of the same name.
    pub fn settle(&mut self, node: NodeId, weight: Weight) {
        self.edits += 1;
        let sources: Vec<_> = self.dag.neighbors_directed(node.0, Direction::Incoming).map(NodeId).collect();
        let wires: Vec<_> = self.dag.edges_directed(node.0, Direction::Incoming).map(|edge| edge.id()).collect();
        for wire in wires {
            self.dag.remove_edge(wire);
        }
        self.dag[node.0].kind = Kind::Const(Const { weight, origin: Origin::Initializer, overridable: false });
        for source in sources {
            self.sweep(source);
        }
    }

    /// Makes the input at `place` of the list the constant `weight`, so that it is fed no longer.
    pub(crate) fn settle_input(&mut self, place: usize, weight: Weight) {
        let input = self.inputs.remove(place);
        self.settle(input.node, weight);
    }

    /// Makes the constant `node` the operator `op` on `operands`, of the same name, at the place of its first reader.
    pub(crate) fn unsettle(&mut self, node: NodeId, mut op: Op, operands: &[Outlet]) {
        self.edits += 1;
        op.arity = operands.len();
        let readers = self.uses(node.out()).into_iter().map(|(reader, _)| self.dag[reader.0].position);
        let position = readers.min().unwrap_or(u64::MAX);
        (self.dag[node.0].kind, self.dag[node.0].position) = (Kind::Op(Box::new(op)), position);
        for (slot, &operand) in (0..).zip(operands) {
            self.wire(operand, node, Inlet::Slot(slot));
        }
    }

    /// Has the graph and the bodies in it, which are as a file spells them in another way, count as edited as often as `before`.
    pub(crate) fn count_as(&mut self, before: &Self) {
        self.edits = before.edits;
        for id in self.holders() {
            let bodies = before.op(id).map_or(&[][..], |op| &op.bodies);
            for (body, before) in self.bodies_mut(id).iter_mut().zip(bodies) {
                body.graph.count_as(&before.graph);
            }
        }
    }

    /// Calls `value`, which is no input or output of the graph, `name` or like it.
    pub fn call(&mut self, value: Outlet, name: &str) {
        let name = self.fresh_name(name);
        self.forget_info(value);
        self.rename(value, name);
    }

    fn rename(&mut self, value: Outlet, name: String) {
        self.names.insert(name.clone());
        self.dag[value.node.0].outputs[value.slot as usize] = name;
    }

    /// Has `node` read `operand` in `slot`, or nothing; trailing slots without an operand are dropped.
    pub fn set_operand(&mut self, node: NodeId, slot: u32, operand: Option<Outlet>) {
        self.edits += 1;
        self.unwire(node, Inlet::Slot(slot));
        if let Some(operand) = operand {
            self.wire(operand, node, Inlet::Slot(slot));
        }
        let arity = self.operands(node).iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        if let Kind::Op(op) = &mut self.dag[node.0].kind {
            op.arity = arity.max(slot as usize + usize::from(operand.is_some()));
        }
    }

    /// Drops operands of `node` that are left out at the end; says how many.
    pub fn trim_operands(&mut self, node: NodeId) -> usize {
        let wanted = self.operands(node).iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        let Kind::Op(op) = &mut self.dag[node.0].kind else { return 0 };
        let trimmed = op.arity.saturating_sub(wanted);
        if trimmed > 0 {
            op.arity = wanted;
            self.edits += 1;
        }
        trimmed
    }

    /// Declares inputs of `BFLOAT16` as of single precision, and nothing of other values of that type.
    pub(crate) fn widen_declarations(&mut self) {
        let narrow = |info: &ValueInfoProto| match &info.r#type {
            Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), .. }) => {
                tensor.elem_type == Some(DType::Bfloat16 as i32)
            }
            _ => false,
        };
        self.value_info.retain(|info| !narrow(info));
        let outputs = self.outputs.iter_mut().map(|output| &mut output.info);
        for info in self.inputs.iter_mut().map(|input| &mut input.info).chain(outputs).filter(|info| narrow(info)) {
            if let Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), .. }) = &mut info.r#type {
                tensor.elem_type = Some(DType::Float as i32);
            }
        }
        self.edits += 1;
    }

    /// Has `node` read `operand` in `slot` in place of what it read there, which goes if nothing else reads it.
    pub fn exchange_operand(&mut self, node: NodeId, slot: u32, operand: Option<Outlet>) {
        let old = self.operand(node, slot);
        if old.is_some() || operand.is_some() {
            self.set_operand(node, slot, operand);
        }
        if let Some(old) = old {
            self.sweep(old.node);
        }
    }

    /// Gives each `Capture(i)` the number `f(i)`.
    pub(crate) fn renumber_captures(&mut self, f: impl Fn(u32) -> u32) {
        for node in self.dag.node_weights_mut() {
            if let Kind::Capture(i) = &mut node.kind {
                *i = f(*i);
            }
        }
    }

    /// Drops the binding of captured value `i` of `node`, which no body reads.
    pub fn drop_capture(&mut self, node: NodeId, i: u32) {
        self.edits += 1;
        self.unwire(node, Inlet::Captured(i));
    }

    fn unwire(&mut self, node: NodeId, inlet: Inlet) {
        let wire = self.dag.edges_directed(node.0, Direction::Incoming).find(|edge| edge.weight().to == inlet);
        if let Some(wire) = wire.map(|edge| edge.id()) {
            self.dag.remove_edge(wire);
        }
    }

    /// Edits the operator of `node` in place, if it is one.
    pub fn edit_op(&mut self, node: NodeId, edit: impl FnOnce(&mut Op)) {
        if let Kind::Op(op) = &mut self.dag[node.0].kind {
            self.edits += 1;
            edit(op);
        }
    }

    /// The bodies of `node`, to be edited; their own edits count.
    pub fn bodies_mut(&mut self, node: NodeId) -> &mut [Body] {
        match &mut self.dag[node.0].kind {
            Kind::Op(op) => &mut op.bodies,
            _ => &mut [],
        }
    }

    /// Has every `Constant` node whose value is no output be an initializer; says how many there were.
    pub fn list_constants(&mut self) -> usize {
        let outputs: HashSet<_> = self.outputs.iter().map(|output| output.value.node).collect();
        let mut listed = 0;
        for id in self.node_ids().filter(|id| !outputs.contains(id)).collect::<Vec<_>>() {
            if let Kind::Const(constant) = &mut self.dag[id.0].kind
                && matches!(constant.origin, Origin::Node { .. })
            {
                constant.origin = Origin::Initializer;
                listed += 1;
            }
        }
        self.edits += listed as u64;
        listed
    }

    /// Has the constant `inner` of body `index` of `holder` be `value` of this graph, which is the same.
    pub fn capture(&mut self, holder: NodeId, index: usize, inner: NodeId, value: Outlet) {
        let captures = self.captures(holder);
        let known = captures.iter().find(|(_, captured)| **captured == value).map(|(&number, _)| number);
        let number = known.unwrap_or_else(|| captures.keys().last().map_or(0, |last| last + 1));
        if known.is_none() {
            self.edits += 1;
            self.wire(value, holder, Inlet::Captured(number));
        }
        let Some(body) = self.bodies_mut(holder).get_mut(index) else { return };
        let graph = &mut body.graph;
        let captured = |id: &NodeId| matches!(graph.kind(*id), Kind::Capture(other) if *other == number);
        let found = graph.node_ids().find(captured);
        if let Some(capture) = found {
            graph.replace_uses(inner.out(), capture.out());
            graph.sweep(inner);
        } else {
            graph.edits += 1;
            graph.dag[inner.0].kind = Kind::Capture(number);
        }
    }

    /// Gives the constant `value` another weight, if `value` is one that nothing but the caller's own rewrite reads.
    pub fn set_weight(&mut self, value: Outlet, weight: Weight) {
        if let Kind::Const(constant) = &mut self.dag[value.node.0].kind {
            self.edits += 1;
            constant.weight = weight;
            constant.origin.hold_tensor();
        }
    }

    /// Whether `node` can go: nothing reads it, it is no input that must be fed, and no annotation mentions it.
    #[must_use]
    pub fn is_dead(&self, node: NodeId) -> bool {
        !matches!(self.kind(node), Kind::Input)
            && self.dag.edges_directed(node.0, Direction::Outgoing).next().is_none()
            && self.outputs.iter().all(|output| output.value.node != node)
            && !(0..self.output_count(node)).any(|slot| self.is_pinned(node.at(slot)))
    }

    /// Removes `node` if it is dead, and whatever that leaves dead before it; says how many nodes went.
    pub fn sweep(&mut self, node: NodeId) -> usize {
        let (mut swept, mut stack) = (0, vec![node]);
        while let Some(node) = stack.pop() {
            if !self.contains(node) || !self.is_dead(node) {
                continue;
            }
            stack.extend(self.dag.neighbors_directed(node.0, Direction::Incoming).map(NodeId));
            let lost: u64 = self.op(node).map_or(0, |op| op.bodies.iter().map(|body| body.graph.edits()).sum::<u64>());
            self.edits += 1 + lost;
            self.inputs.retain(|input| input.node != node);
            self.retire(node);
            swept += 1;
        }
        swept
    }

    /// Removes `node`, which nothing reads, but keeps its id from being given again.
    fn retire(&mut self, node: NodeId) {
        let wires: Vec<_> = self.dag.edges_directed(node.0, Direction::Incoming).map(|edge| edge.id()).collect();
        for wire in wires {
            self.dag.remove_edge(wire);
        }
        self.dag[node.0] = Node { kind: Kind::Input, outputs: Vec::new(), position: 0, gone: true };
    }

    /// Frees the ids of removed nodes, in bodies too: what is known of the graph by id is known no longer.
    pub(crate) fn purge(&mut self) {
        self.dag.retain_nodes(|dag, id| !dag[id].gone);
        for node in self.dag.node_weights_mut() {
            if let Kind::Op(op) = &mut node.kind {
                op.bodies.iter_mut().for_each(|body| body.graph.purge());
            }
        }
    }

    /// Forgets what the file declares of `value`, which no longer holds.
    pub fn forget_info(&mut self, value: Outlet) {
        let name = self.name(value).to_owned();
        self.edits += 1;
        self.value_info.retain(|info| info.name() != name);
    }

    /// Has whatever reads the one result of `node` read `value`, which is the same, and removes `node`. `None`, and nothing
    /// done, where the result is an output whose name `value` can't take.
    pub fn bypass(&mut self, node: NodeId, value: Outlet) -> Option<()> {
        if self.is_output(node.out()) && !self.can_take_name(value) {
            return None;
        }
        self.replace_uses(node.out(), value);
        self.sweep(node);
        Some(())
    }

    /// Makes `node` the operator `op` on `operands`; what it read before goes if nothing else reads it.
    pub fn replace_op(&mut self, node: NodeId, op: Op, operands: &[Outlet]) {
        let before = self.operands(node);
        self.edit_op(node, |old| *old = op);
        self.set_operands(node, operands);
        for operand in before.into_iter().flatten() {
            self.sweep(operand.node);
        }
    }

    /// Has `node` read `operands`, and nothing else.
    pub fn set_operands(&mut self, node: NodeId, operands: &[Outlet]) {
        self.edits += 1;
        let slots = |inlet: &Inlet| matches!(inlet, Inlet::Slot(_));
        let wires = self.dag.edges_directed(node.0, Direction::Incoming).filter(|edge| slots(&edge.weight().to));
        for wire in wires.map(|edge| edge.id()).collect::<Vec<_>>() {
            self.dag.remove_edge(wire);
        }
        for (slot, &operand) in (0..).zip(operands) {
            self.wire(operand, node, Inlet::Slot(slot));
        }
        if let Kind::Op(op) = &mut self.dag[node.0].kind {
            op.arity = operands.len();
        }
    }

    /// Has no constant keep its data in another file.
    pub(crate) fn inline_external(&mut self) {
        for node in self.dag.node_weights_mut() {
            match &mut node.kind {
                Kind::Const(constant) if constant.weight.value().is_external() => {
                    let dims = constant.weight.value().dims().to_vec();
                    if let Some(inline) = constant.weight.reshape(&dims) {
                        constant.weight = inline;
                    }
                }
                Kind::Op(op) => op.bodies.iter_mut().for_each(|body| body.graph.inline_external()),
                _ => {}
            }
        }
    }

    /// Corrects the declared extents of values and outputs: for a name, the new extent of some axes.
    pub(crate) fn edit_extents(&mut self, extents: &BTreeMap<String, Vec<(usize, usize)>>) {
        let outputs = self.outputs.iter_mut().map(|output| &mut output.info);
        for info in self.value_info.iter_mut().chain(outputs) {
            let Some(changed) = extents.get(info.name()) else { continue };
            let Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), .. }) = &mut info.r#type else {
                continue;
            };
            let Some(shape) = &mut tensor.shape else { continue };
            for &(axis, extent) in changed {
                if let Some(dim) = shape.dim.get_mut(axis) {
                    dim.value = Some(dimension::Value::DimValue(extent as i64));
                }
            }
        }
    }

    /// Keeps what a file declares of values, whose names are no others': it may declare some that are not there.
    pub(crate) fn declare(&mut self, declared: Vec<ValueInfoProto>) {
        self.names.extend(declared.iter().map(|info| info.name().to_owned()));
        self.value_info = declared;
    }

    /// Frees the names of values that are gone, of which nothing is declared any longer: the graph is another view of what it was.
    pub(crate) fn free_names(&mut self) {
        self.names = self.values().into_keys().map(str::to_owned).collect();
        self.value_info.retain(|info| self.names.contains(info.name()));
    }

    /// Names that are or were in use.
    pub(crate) fn names(&self) -> &HashSet<String> {
        &self.names
    }
}
