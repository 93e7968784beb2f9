//! What passes need to know about a graph.

pub mod channels;
pub mod cost;
pub mod shapes;
