//! Formats, messages of errors, and the identity of trained and served tokens.

use std::sync::LazyLock;

use kinglet_engine::session::Model;
use kinglet_engine::text::{ChatTemplate, EncodeOptions, Message};
use kinglet_models::tiny::{TinyConfig, write_tiny};
use serde_json::json;

use super::*;
use crate::random::{splitmix64, stream};

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("kinglet-train-data-{}.gguf", std::process::id()));
    write_tiny(&path, &TinyConfig::new("llama").with_bpe()).unwrap();
    let model = kinglet_models::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    model
});

fn one(line: &str) -> Record {
    parse("data/a.jsonl", line.as_bytes()).unwrap().remove(0)
}

fn encoder(seq: usize, truncation: Truncation) -> Encoder<'static> {
    Encoder::new(&MODEL, seq, truncation).unwrap()
}

fn base(seq: usize) -> Encoder<'static> {
    Encoder::with(MODEL.tokenizer(), None, seq, Truncation::End)
}

fn text(tokens: &[u32]) -> String {
    String::from_utf8(MODEL.tokenizer().decode(tokens, true)).unwrap()
}

/// The trained stretches of an example as text.
fn trained(example: &Example) -> Vec<String> {
    let mut out = Vec::new();
    let mut current = Vec::new();
    for (token, trained) in std::iter::zip(&example.tokens, &example.trained) {
        if *trained {
            current.push(*token);
        } else if !current.is_empty() {
            out.push(text(&std::mem::take(&mut current)));
        }
    }
    out.extend((!current.is_empty()).then(|| text(&current)));
    out
}

#[test]
fn every_format_is_told_by_its_keys() {
    let chat = |prompt: &str, answer: &str| Sample::Chat {
        messages: vec![Message::new("user", prompt), Message::new("assistant", answer)],
        tools: None,
    };
    for (line, wanted) in [
        (
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
            chat("a", "b"),
        ),
        (json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}), chat("a", "b")),
        (json!({"instruction": "a", "input": "x", "output": "b"}), chat("a\nx", "b")),
        (json!({"instruction": "a", "input": "", "output": "b", "id": 3}), chat("a", "b")),
        (json!({"prompt": "a", "completion": "b"}), chat("a", "b")),
        (json!({"question": "a", "answer": 7}), chat("a", "7")),
        (json!({"text": "a"}), Sample::Text("a".into())),
    ] {
        assert_eq!(one(&line.to_string()).sample, wanted, "{line}");
    }
    let system = one(r#"{"system": "s", "question": "a", "answer": "b"}"#);
    assert!(matches!(system.sample, Sample::Chat { messages, .. } if messages[0] == Message::new("system", "s")));
    let rated = one(r#"{"prompt": "a", "completion": "b", "label": false}"#).sample;
    assert!(matches!(rated, Sample::Rated { good: false, .. }));
}

#[test]
fn pairs_find_their_prompt() {
    let message = |role: &str, content: &str| json!({ "role": role, "content": content });
    let (user, good, bad) = (message("user", "a"), message("assistant", "b"), message("assistant", "c"));
    let wanted = Sample::Pair {
        prompt: vec![Message::new("user", "a")],
        chosen: vec![Message::new("assistant", "b")],
        rejected: vec![Message::new("assistant", "c")],
    };
    for line in [
        json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
        json!({"prompt": [user], "chosen": [good], "rejected": [bad]}),
        json!({"chosen": [user, good], "rejected": [user, bad]}),
        json!({"prompt": "a", "chosen": [user, good], "rejected": [user, bad]}),
    ] {
        assert_eq!(one(&line.to_string()).sample, wanted, "{line}");
    }
}

#[test]
fn errors_name_file_line_and_keys() {
    for (line, parts) in [
        (r#"{"foo": 1, "bar": 2}"#, vec!["data/a.jsonl:2", "foo, bar", "instruction, input, output", "messages"]),
        (r#"{"messages": []}"#, vec!["data/a.jsonl:2", "messages", "not empty"]),
        (r#"{"messages": [{"content": "x"}]}"#, vec!["data/a.jsonl:2", "messages[0]", "role"]),
        (r#"{"text": [1]}"#, vec!["data/a.jsonl:2: text"]),
        (r#"{"prompt": "a", "completion": "b", "label": "good"}"#, vec!["data/a.jsonl:2: label", "true"]),
        (r#"{"chosen": "a", "rejected": "b"}"#, vec!["data/a.jsonl:2: prompt"]),
        (r#"{"text": "a""#, vec!["data/a.jsonl:2", "JSON"]),
        (r#"[1]"#, vec!["data/a.jsonl:2", "object"]),
    ] {
        let file = format!("{{\"text\": \"fine\"}}\n{line}\n");
        let message = parse("data/a.jsonl", file.as_bytes()).unwrap_err().to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{line}: {message}");
    }
    let message = parse("a.txt", b"a\nb\xff").unwrap_err().to_string();
    assert!(message.contains("a.txt:2") && message.contains("UTF-8"), "{message}");
    let message = read(Path::new("none/there.jsonl")).unwrap_err().to_string();
    assert!(message.contains("none/there.jsonl"), "{message}");
}

#[test]
fn files_are_read_by_their_ending() {
    let lines = "\u{feff}{\"text\": \"a\"}\r\n\r\n{\"text\": \"b\"}";
    let records = parse("x.jsonl", lines.as_bytes()).unwrap();
    assert_eq!(records.iter().map(|record| record.line).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(parse("x.json", br#" [{"text": "a"}, {"text": "b"}]"#).unwrap().len(), 2);
    assert_eq!(parse("x.TXT", b"{not json\n").unwrap()[0].sample, Sample::Text("{not json\n".into()));
    assert!(parse("x.json", br#"[{"text": "a"}, {}]"#).unwrap_err().to_string().contains("x.json:2"));
}

#[test]
fn answers_are_trained_with_their_end() {
    let record = one(r#"{"system": "be", "question": "hello", "answer": "the answer"}"#);
    let Sample::Chat { messages, .. } = &record.sample else { panic!() };
    let example = encoder(512, Truncation::End).conversation(messages, None, &record).unwrap().remove(0);
    assert_eq!(trained(&example), ["the answer<|im_end|>"]);
    assert!(text(&example.tokens).ends_with("<|im_start|>assistant\nthe answer<|im_end|>\n"));
    let example = base(512).conversation(messages, None, &record).unwrap().remove(0);
    assert_eq!(text(&example.tokens), "be\nhello\nthe answer<|im_end|>");
    assert_eq!(trained(&example), ["the answer<|im_end|>"]);
    let exact = one(r#"{"prompt": "hel", "completion": "lo"}"#);
    let Sample::Chat { messages, .. } = &exact.sample else { panic!() };
    let example = base(512).conversation(messages, None, &exact).unwrap().remove(0);
    // `hello` is one token; the prompt's tokens stay as served.
    assert_eq!((text(&example.tokens).as_str(), trained(&example)), ("hello<|im_end|>", vec!["lo<|im_end|>".into()]));
}

/// Random conversations, with borders at which tokens want to merge: behind every prompt as it is served, the trained
/// tokens are those of the answer.
#[test]
fn trained_tokens_are_served_tokens() {
    const PIECES: [&str; 12] =
        ["\n", "\n\n", " ", "hello", "the", " user", "and", "é", "答", "<|im_end|", "assistant", "1.5\t"];
    let tokenizer = MODEL.tokenizer();
    let template = MODEL.chat_template().unwrap().unwrap();
    // Without the line feed behind the header, words merge across the border too.
    let tight = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";
    let tight = ChatTemplate::new(tight, tokenizer).unwrap();
    let record = one(r#"{"text": ""}"#);
    let (mut whole, mut apart) = (0, 0);
    for case in 0..400u64 {
        let mut counter = 0;
        let mut random = |range: u64| {
            counter += 1;
            splitmix64(stream("chat", case), counter) % range
        };
        let mut messages = Vec::new();
        for turn in 0..1 + random(3) {
            let mut content = |least: u64| {
                let count = least + random(5);
                (0..count).map(|_| PIECES[random(12) as usize]).collect::<String>()
            };
            if turn == 0 {
                messages.push(Message::new("system", content(0)));
            }
            messages.push(Message::new("user", content(0)));
            messages.push(Message::new("assistant", format!("{}x", content(1))));
        }
        for template in [template, &tight] {
            let encoder = Encoder::with(tokenizer, Some(template), 4096, Truncation::End);
            let examples = encoder.conversation(&messages, None, &record).unwrap();
            let full = template.render(&messages, None, false).unwrap();
            let answers: Vec<usize> = (0..messages.len()).filter(|i| messages[*i].role == "assistant").collect();
            let in_one = examples[0].tokens == tokenizer.encode_prompt(&full);
            if in_one {
                whole += 1;
                assert_eq!((examples.len(), trained(&examples[0]).len()), (1, answers.len()));
            } else {
                apart += 1;
                assert_eq!(examples.len(), answers.len());
            }
            for (number, &index) in answers.iter().enumerate() {
                let example = &examples[if in_one { 0 } else { number }];
                let served = tokenizer.encode_prompt(&template.render(&messages[..index], None, true).unwrap());
                assert!(example.tokens.starts_with(&served), "case {case}: {messages:?}");
                assert!(example.trained[served.len()] && !example.trained[served.len() - 1]);
                let stretch = example.trained[served.len()..].iter().take_while(|trained| **trained).count();
                let learned = text(&example.tokens[served.len()..served.len() + stretch]);
                let content = &messages[index].content;
                assert!(learned.starts_with(content), "case {case}: {learned:?} for {content:?}");
            }
        }
    }
    assert!(whole > 100 && apart > 50, "{whole} {apart}");
}

#[test]
fn long_examples_are_cut_as_asked() {
    let records = parse("a.jsonl", br#"{"question": "hello", "answer": "the user and the answer"}"#).unwrap();
    let full = encoder(512, Truncation::End).examples(&records, &Loss::CrossEntropy, &mut Summary::default()).unwrap();
    let Examples::Plain(full) = full else { panic!() };
    let (full, length) = (&full[0], full[0].tokens.len());
    for (truncation, range) in [(Truncation::End, 0..length - 3), (Truncation::Start, 3..length)] {
        let mut summary = Summary::default();
        let cut = encoder(length - 3, truncation).examples(&records, &Loss::CrossEntropy, &mut summary).unwrap();
        let wanted = Example::new(full.tokens[range.clone()].to_vec(), full.trained[range].to_vec());
        assert_eq!((summary.truncated, summary.trained), (1, wanted.trained_tokens()));
        assert_eq!(cut, Examples::Plain(vec![wanted]));
    }
    for (seq, truncation) in [(length - 3, Truncation::Drop), (4, Truncation::End)] {
        let mut summary = Summary::default();
        assert!(encoder(seq, truncation).examples(&records, &Loss::CrossEntropy, &mut summary).unwrap().is_empty());
        assert_eq!((summary.dropped, summary.examples), (1, 0));
    }
}

#[test]
fn text_goes_on_in_further_rows() {
    let words = "the user and hello ".repeat(30);
    let rows = encoder(16, Truncation::End).text(&words);
    let tokens: Vec<u32> = rows.iter().flat_map(|row| row.tokens.clone()).collect();
    let mut wanted = MODEL.tokenizer().encode(&words, EncodeOptions::TEXT);
    wanted.extend(MODEL.tokenizer().eos());
    assert!(wanted.starts_with(&tokens) && wanted.len() - tokens.len() < 2);
    assert!(rows.iter().all(|row| row.tokens.len() <= 16 && row.trained_tokens() == row.tokens.len() - 1));
}

#[test]
fn preferences_train_the_last_answer_alone() {
    let line = json!({
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the"}, {"role": "user", "content": "b"}],
        "chosen": "hello", "rejected": "and"
    })
    .to_string();
    let records = parse("a.jsonl", line.as_bytes()).unwrap();
    let mut summary = Summary::default();
    let pairs = encoder(512, Truncation::End).examples(&records, &Loss::dpo(), &mut summary).unwrap();
    let Examples::Pairs(pairs) = pairs else { panic!() };
    assert_eq!(trained(&pairs[0].chosen), ["hello<|im_end|>"]);
    assert_eq!(trained(&pairs[0].rejected), ["and<|im_end|>"]);
    let kto = Loss::Kto { beta: 0.1, good: 1.0, bad: 1.0 };
    let Examples::Rated(rated) = encoder(512, Truncation::End).examples(&records, &kto, &mut summary).unwrap() else {
        panic!()
    };
    assert_eq!((rated[0].good, rated[1].good, rated[0].prompt), (true, false, rated[1].prompt));
    assert_eq!(trained(&rated[1].example), ["and<|im_end|>"]);
    let message = encoder(512, Truncation::End).examples(&records, &Loss::CrossEntropy, &mut summary).unwrap_err();
    assert!(message.to_string().contains("a.jsonl:1") && message.to_string().contains("dpo"), "{message}");
}

#[test]
fn loads_and_splits() {
    let folder = std::env::temp_dir().join(format!("kinglet-train-load-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let write = |name: &str, contents: String| {
        let path = folder.join(name);
        std::fs::write(&path, contents).unwrap();
        path
    };
    let config = TrainConfig { seq: 64, val_fraction: 0.2, ..TrainConfig::default() };
    let line =
        |i: u32| json!({ "question": format!("What about {i}?"), "answer": format!("hello {i}") }).to_string() + "\n";
    let (a, b) = (write("a.jsonl", (0..60).map(line).collect()), write("b.jsonl", (60..100).map(line).collect()));
    let data = load([&a, &b].as_slice().into(), &MODEL, &config).unwrap();
    assert_eq!((data.summary.records, data.train.len() + data.validation.len()), (100, 100));
    assert!((8..35).contains(&data.validation.len()), "{}", data.validation.len());
    let text = write("c.txt", "hello and the user ".repeat(400));
    let data = load([&text].as_slice().into(), &MODEL, &config).unwrap();
    assert!(
        data.validation.len() * 4 == data.train.len() || data.validation.len().abs_diff(data.summary.examples / 5) <= 1
    );
    let message = load([&write("d.jsonl", String::new())].as_slice().into(), &MODEL, &config).unwrap_err().to_string();
    assert!(message.contains("nothing to train on"), "{message}");
    std::fs::remove_dir_all(&folder).unwrap();
}
