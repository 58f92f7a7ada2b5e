//! Which records are kept for validation.
//!
//! Records with the same prompt go together, and so do those with the same longer answer: files of questions repeat
//! answers, and a validation loss on answers that were trained flatters. The group decides, by the smallest xxh64 of its
//! normalised prompts against the fraction: never the row's number, so a record keeps its side when others are added, and
//! near-duplicates that differ in case, punctuation or spacing stay together.

use std::collections::HashMap;

use kinglet_engine::text::Message;
use xxhash_rust::xxh64::xxh64;

use super::{Record, Sample};

/// Shorter answers (`yes`, `42`) say nothing about a common origin. In normalised bytes.
const LONG_ANSWER: usize = 40;

/// Records to train on and to validate on, each in the order given. About `fraction` of the groups are in the second.
pub fn split(records: Vec<Record>, fraction: f64) -> (Vec<Record>, Vec<Record>) {
    // Union-find over the records, joined by what they share.
    let mut parents: Vec<usize> = (0..records.len()).collect();
    let mut prompts = Vec::with_capacity(records.len());
    let mut seen = HashMap::new();
    for (index, record) in records.iter().enumerate() {
        let (prompt, answer) = keys(&record.sample);
        let prompt = hash(&prompt);
        prompts.push(prompt);
        let answer = (answer.len() >= LONG_ANSWER).then(|| (true, hash(&answer)));
        for key in std::iter::once((false, prompt)).chain(answer) {
            let other = *seen.entry(key).or_insert(index);
            let (a, b) = (root(&mut parents, index), root(&mut parents, other));
            parents[a.max(b)] = a.min(b);
        }
    }
    let mut least = prompts.clone();
    for (index, prompt) in prompts.into_iter().enumerate() {
        let group = root(&mut parents, index);
        least[group] = least[group].min(prompt);
    }
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (index, record) in records.into_iter().enumerate() {
        let share = least[root(&mut parents, index)] as f64 / 2f64.powi(64);
        if share < fraction { validation.push(record) } else { train.push(record) }
    }
    (train, validation)
}

fn root(parents: &mut [usize], mut index: usize) -> usize {
    while parents[index] != index {
        parents[index] = parents[parents[index]];
        index = parents[index];
    }
    index
}

fn hash(text: &str) -> u64 {
    xxh64(text.as_bytes(), 0)
}

/// What groups a record: its prompt (for text, the text) and its answer, normalised.
fn keys(sample: &Sample) -> (String, String) {
    match sample {
        Sample::Text(text) => (normalise([text.as_str()]), String::new()),
        Sample::Chat { messages, .. } => {
            let answer = messages.iter().position(|message| message.role == "assistant").unwrap_or(messages.len());
            let (prompt, answers) = messages.split_at(answer);
            (normalise(questions(prompt)), normalise(answers.iter().take(1).map(|message| message.content.as_str())))
        }
        Sample::Pair { prompt, .. } | Sample::Rated { prompt, .. } => (normalise(questions(prompt)), String::new()),
    }
}

/// A system prompt is the same for many records and distinguishes none.
fn questions(messages: &[Message]) -> impl Iterator<Item = &str> {
    messages.iter().filter(|message| message.role != "system").map(|message| message.content.as_str())
}

/// Lower-case letters and digits, in words with one space between them.
fn normalise<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let mut out = String::new();
    for word in texts.into_iter().flat_map(|text| text.split(|c: char| !c.is_alphanumeric())) {
        if !word.is_empty() {
            if !out.is_empty() {
                out.push(' ');
            }
            out.extend(word.chars().flat_map(char::to_lowercase));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    fn records(pairs: &[(String, String)]) -> Vec<Record> {
        let line = |(q, a): &(String, String)| serde_json::json!({ "question": q, "answer": a }).to_string() + "\n";
        parse("a.jsonl", pairs.iter().map(line).collect::<String>().as_bytes()).unwrap()
    }

    fn numbered(count: usize) -> Vec<(String, String)> {
        (0..count).map(|i| (format!("What is number {i}?"), format!("It is {i}."))).collect()
    }

    #[test]
    fn takes_about_the_fraction_and_keeps_sides() {
        let (train, validation) = split(records(&numbered(2000)), 0.1);
        assert_eq!(train.len() + validation.len(), 2000);
        // 200 expected, standard deviation 13.
        assert!((150..250).contains(&validation.len()), "{}", validation.len());
        let (_, more) = split(records(&numbered(3000)), 0.1);
        assert!(validation.iter().all(|record| more.contains(record)));
        assert!(split(records(&numbered(50)), 0.0).1.is_empty());
    }

    #[test]
    fn alike_prompts_and_shared_answers_stay_together() {
        let long = |i: usize| format!("The answer to all of these is the same long sentence about {i}.");
        let mut pairs = Vec::new();
        for i in 0..300 {
            pairs.push((format!("what is  number {i}"), format!("short {i}")));
            pairs.push((format!("What is number {i}?!"), long(i)));
            pairs.push((format!("Something else about {i}"), long(i)));
            pairs.push((format!("Something apart, {i}"), "Yes.".into()));
        }
        let (train, validation) = split(records(&pairs), 0.3);
        let side = |wanted: &str| {
            let has = |records: &[Record]| {
                records.iter().any(|record| match &record.sample {
                    Sample::Chat { messages, .. } => messages[0].content == wanted,
                    _ => false,
                })
            };
            assert!(has(&train) != has(&validation));
            has(&validation)
        };
        let mut apart = 0;
        for i in 0..300 {
            let first = side(&format!("what is  number {i}"));
            assert_eq!(first, side(&format!("What is number {i}?!")));
            assert_eq!(first, side(&format!("Something else about {i}")));
            apart += usize::from(first != side(&format!("Something apart, {i}")));
        }
        assert!(apart > 50, "{apart}");
    }

    /// The hash is the published one: xxh64 of `abc` with seed 0.
    #[test]
    fn hashes_as_published() {
        assert_eq!((hash("abc"), normalise(["  ABC,  ", "é1"])), (0x44BC2CF5AD770999, "abc é1".into()));
    }
}
