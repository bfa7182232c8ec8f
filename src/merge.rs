//! Ways of combining adapters.

mod soup;

pub use soup::Soup;
