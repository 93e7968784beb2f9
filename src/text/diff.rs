//! What differs between two models.

use std::fmt;

use similar::TextDiff;

use super::print;
use crate::{
    analysis::cost::Cost,
    codec::Model,
    verify::{Request, Samples},
};

/// Unchanged lines shown around each change.
const CONTEXT: usize = 2;

/// The difference between two models.
#[derive(Clone, Debug)]
pub struct Diff {
    /// The costs of both.
    pub costs: (Cost, Cost),
    /// The changed lines of their texts, in the unified format; empty where the texts are the same.
    pub lines: String,
    /// Whether the files differ in anything at all, what the text leaves out included.
    pub is_same: bool,
}

/// Compares two models: costs at likely shapes, and texts line by line.
#[must_use]
pub fn diff(a: &Model, b: &Model) -> Diff {
    let shapes = |model| Samples::likely_shapes(model, &Request::default());
    // A file that was read spells stored weights as nodes; the texts tell what they are.
    let raised = |model: &Model| {
        let mut model = model.clone();
        model.raise();
        print(&model)
    };
    let (from, to) = (raised(a), raised(b));
    let lines = TextDiff::from_lines(&from, &to).unified_diff().context_radius(CONTEXT).to_string();
    Diff { costs: (Cost::of(a, &shapes(a)), Cost::of(b, &shapes(b))), lines, is_same: a.to_proto() == b.to_proto() }
}

impl fmt::Display for Diff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_same {
            return Ok(());
        }
        write!(f, "{}", self.costs.0.compared_to(&self.costs.1))?;
        if self.lines.is_empty() {
            return writeln!(
                f,
                "only what the text leaves out differs: doc strings, annotations, or how constants are spelled"
            );
        }
        write!(f, "\n{}", self.lines)
    }
}
