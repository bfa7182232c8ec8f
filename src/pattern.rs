//! The keys of `rank_pattern` and `alpha_pattern`: regular expressions that come with an adapter.

use regex::{Regex, RegexBuilder};

use crate::error::{Error, Result};

/// What a compiled pattern may take, in bytes: names of modules need far less.
const LARGEST: usize = 1 << 20;

/// For each module, the first pattern that matches it as PEFT has it (`get_pattern_key`): the whole
/// of its path, or all that follows a dot.
///
/// The engine takes time linear in the text, where Python's can be made to hang.
///
/// # Errors
/// A pattern does not parse, or needs what only a backtracking engine can do.
pub fn first_match(patterns: &[String], modules: &[String]) -> Result<Vec<Option<usize>>> {
    let built = |pattern: &str| RegexBuilder::new(pattern).size_limit(LARGEST).build();
    let compile = |pattern: &String| -> Result<Regex> {
        let fault = |reason: String| Error::Pattern { pattern: pattern.clone(), reason };
        // On its own first: `a)(b` must not become valid by being put into parentheses.
        built(pattern)
            .and_then(|_| built(&format!(r"^(?:(.*\.)?({pattern}))$")))
            .map_err(|error| fault(error.to_string().lines().last().unwrap_or_default().to_owned()))
    };
    // One held at a time: a file may have thousands.
    let mut found = vec![None; modules.len()];
    for (index, pattern) in patterns.iter().enumerate() {
        let pattern = compile(pattern)?;
        for (first, module) in found.iter_mut().zip(modules) {
            if first.is_none() && pattern.is_match(module) {
                *first = Some(index);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(patterns: &[&str], modules: &[&str]) -> Result<Vec<Option<usize>>> {
        let owned = |all: &[&str]| all.iter().map(|&s| s.to_owned()).collect::<Vec<_>>();
        first_match(&owned(patterns), &owned(modules))
    }

    #[test]
    fn the_first_pattern_that_matches_a_dotted_end_wins() {
        let patterns = ["layers.0.q_proj", "q_proj", r"layers\.\d+\.v_proj", "a|b"];
        let modules =
            ["m.layers.0.q_proj", "m.layers.1.q_proj", "xq_proj", "layers.7.v_proj", "m.b"];
        let expected = [Some(0), Some(1), None, Some(2), Some(3)];
        assert_eq!(matches(&patterns, &modules).unwrap(), expected);
    }

    #[test]
    fn hostile_patterns_end_at_once() {
        let module = "a".repeat(5000);
        assert_eq!(matches(&["(a+)+b"], &[&module]).unwrap(), [None]);
        for pattern in ["(", "a)(b", r"(a)\1", "(?=a)", "a{1000}{1000}{1000}", r"\w{200}"] {
            let error = matches(&[pattern], &[]).unwrap_err().to_string();
            assert!(error.contains("linear time"), "{error}");
        }
    }
}
