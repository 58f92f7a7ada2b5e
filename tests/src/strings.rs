//! Texts on which tokenizers are compared: seeded, so that two programs see the same ones.
//!
//! [`corpus`] mixes kinds of text that trip tokenizers: many scripts, emoji joined by ZWJ, controls, code, runs of white
//! space, numbers of every script, piled-up combining marks, look-alikes of special tokens, invalid UTF-8, and a few long
//! strings. The one thing left out is UTF-8 for numbers beyond U+10FFFF, on which llama.cpp aborts.

use crate::data::Random;

/// Sentences of many scripts; those in Chinese are from statutes of the PRC (no copyright) or made for the test.
const SENTENCES: &[&str] = &[
    "民事主体从事民事活动，应当遵循公平原则，合理确定各方的权利和义务。",
    "第一千零四十三条　家庭应当树立优良家风，弘扬家庭美德，重视家庭文明建设。",
    "生产经营单位的主要负责人对本单位的安全生产工作全面负责（含2021年修正）。",
    "臺灣與香港的繁體字：藝術、龍鳳、憂鬱的烏龜。",
    "“你好，世界！”——他说：《红楼梦》第3回……很好看吗？",
    "The quick brown fox jumps over the lazy dog; it's 'tis, don't, WE'LL, I'VE, she'd've.",
    "Don’t use “smart quotes” — or en–dashes… unless you’re sure.",
    "Größenwahn, naïve façade, Øresund, Łódź, İstanbul'da, čeština, ﬁnancial oﬃce.",
    "Быстрая коричневая лиса прыгает через ленивую собаку. Ёлка, объём, Ъ.",
    "Η γρήγορη καφετιά αλεπού πηδάει· ΆΈΉΊΌΎΏ ϐϑϒ.",
    "مرحبا بالعالم، كيف حالك؟ السَّلامُ عَلَيْكُم ١٢٣٤٥ ـــ لا إله.",
    "שלום עולם, מה שלומך? בְּרֵאשִׁית בָּרָא אֱלֹהִים",
    "नमस्ते दुनिया। क्या हाल है? हिन्दी में १२३४ अंक और क्ष्त्रिय।",
    "স্বাগতম বাংলা ভাষায়, তামিল: வணக்கம் உலகம், తెలుగు నమస్కారం.",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง กี่ปีแล้ว ๑๒๓",
    "안녕하세요 세계! 한국어 띄어쓰기를 합니다. 각가힣 ㄱㄴㅏ",
    "こんにちは、世界。カタカナとﾊﾝｶｸと漢字、々〆ヶ。平仮名ゔゞ",
    "ສະບາຍດີ ភាសាខ្មែរ မြန်မာဘာသာ ქართული հայերեն አማርኛ ᏣᎳᎩ",
    "ꯃꯤꯇꯩꯂꯣꯟ 𐍈𐌰𐌹 𝓗𝓮𝓵𝓵𝓸 𝟘𝟙𝟚 𠀀𠮷𪚥 ℝ²∖{0} ∑ᵢ₌₁ⁿ xᵢ ≤ ∞",
];

const CODE: &[&str] = &[
    "fn main() {\n    let x: Vec<u8> = vec![0; 1024];\n\tprintln!(\"{x:?}\");\n}\n",
    "def f(a, *args, **kw):\n    \"\"\"doc\"\"\"\n    return {k: v for k, v in kw.items()}  # TODO\n\n\n",
    "#include <stdio.h>\r\nint main(void) {\r\n\treturn 0xDEAD_BEEF >> 3;\r\n}\r\n",
    "SELECT * FROM t WHERE a='x' AND b<>1.5e-10;--\n",
    "<div class=\"a b\"><p>&nbsp;</p><br/></div><!-- x -->",
    "{\"a\": [1, 2.50, -3e+7, null, true], \"b\": {\"c\": \"\\u00e9\\n\"}}",
    "https://example.org/path?q=1&r=%E4%BD%A0#frag user@mail.example C:\\dir\\file.txt ~/.bashrc",
    "$x = @y || !z ** 2 ... a->b::c[i++] /= 0; `ls -la | grep ^d`; 100% ~= ===",
];

const EMOJI: &[&str] =
    &["😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇳🇩🇪", "❤️", "☺", "1️⃣", "🧑🏿‍🚀", "\u{200D}", "\u{FE0F}", "🫠", "🀄", "©", "™️"];

const SPACES: &[&str] = &[
    " ", " ", " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", "\u{0B}", "\u{0C}", "\u{85}", "\u{A0}", "\u{1680}",
    "\u{2003}", "\u{2009}", "\u{200B}", "\u{2028}", "\u{2029}", "\u{202F}", "\u{205F}", "\u{3000}", "\u{FEFF}", "▁",
    "\u{180E}",
];

const NUMBERS: &[&str] = &[
    "0",
    "7",
    "12",
    "2024",
    "3.14159",
    "1,234,567.89",
    "１２３",
    "٣٤٥",
    "४५",
    "½",
    "Ⅷ",
    "②",
    "²",
    "〇",
    "𝟡",
    "1st",
    "0x1F",
    "1e10",
    "-5",
    "+86 138-0013-8000",
    "12:34:56",
    "v1.2.3",
];

const MARKS: &[&str] =
    &["\u{301}", "\u{308}", "\u{327}", "\u{20DD}", "\u{5B0}", "\u{64B}", "\u{93C}", "\u{3099}", "\u{E31}", "\u{1AB0}"];

/// Texts of special tokens of several families, and near misses.
const SPECIALS: &[&str] = &[
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|file_sep|>",
    "<|repo_name|>",
    "<tool_call>",
    "</tool_call>",
    "<repo_name>",
    "<gh_stars>",
    "<empty_output>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "<mask>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<unused7>",
    "[multimodal]",
    "<table>",
    "</table>",
    "<h1>",
    "</s>",
    "<s>",
    "<0x0A>",
    "<0xE4>",
    "<|im_start|",
    "|im_end|>",
    "<|im_|im_end|>end|>",
    "< |im_end|>",
    "<|IM_END|>",
    "<<bos>>",
    "<unused",
    "[EOT]",
    "<|eot_id|>",
    "Ġ",
    "Ċ",
    "ĠĠ",
    "âĢľ",
];

/// `count` texts; not always UTF-8. Equal seeds give equal texts.
pub fn corpus(seed: u64, count: usize) -> Vec<Vec<u8>> {
    let mut random = Random::new(seed);
    (0..count).map(|_| text(&mut random)).collect()
}

fn text(random: &mut Random) -> Vec<u8> {
    let mut out = Vec::new();
    match random.below(40) {
        // One long text in forty.
        0 => {
            let unit = piece(random);
            let length = 200 + random.below(6000);
            while out.len() < length && !unit.is_empty() {
                out.extend_from_slice(&unit);
                if random.below(50) == 0 {
                    out.extend(piece(random));
                }
            }
        }
        // One invalid text in eight.
        1..=5 => {
            for _ in 0..1 + random.below(4) {
                out.extend(piece(random));
            }
            for _ in 0..1 + random.below(5) {
                let at = random.below(out.len() + 1);
                match random.below(3) {
                    0 => out.insert(at, 0x80 | random.bits() as u8),
                    1 if at < out.len() => drop(out.remove(at)),
                    _ => out.truncate(at),
                }
            }
            for _ in 0..random.below(20) {
                out.push(random.bits() as u8);
            }
        }
        _ => {
            for _ in 0..1 + random.below(8) {
                out.extend(piece(random));
            }
        }
    }
    // Lead bytes of numbers beyond Unicode.
    out.iter_mut().filter(|byte| (0xF4..0xF8).contains(*byte)).for_each(|byte| *byte = 0xF9);
    out
}

fn piece(random: &mut Random) -> Vec<u8> {
    let mut out = String::new();
    match random.below(14) {
        0..=2 => {
            let sentence: Vec<char> = random.pick(SENTENCES).chars().collect();
            let start = random.below(sentence.len());
            let end = start + 1 + random.below(sentence.len() - start);
            out.extend(&sentence[start..end]);
        }
        3 => out.push_str(random.pick(CODE)),
        4 => (0..1 + random.below(4)).for_each(|_| out.push_str(random.pick(EMOJI))),
        5 | 6 => (0..1 + random.below(9)).for_each(|_| out.push_str(random.pick(SPACES))),
        7 => {
            for _ in 0..1 + random.below(4) {
                out.push_str(random.pick(NUMBERS));
                out.push_str(random.pick(&["", "", " ", ",", "-"]));
            }
        }
        8 => {
            for _ in 0..1 + random.below(5) {
                out.push(random.pick(&['a', 'E', 'о', 'α', 'अ', 'は', 'ก', '中', ' ', '1']));
                (0..random.below(4)).for_each(|_| out.push_str(random.pick(MARKS)));
            }
        }
        9 => {
            for _ in 0..1 + random.below(3) {
                out.push_str(random.pick(SPECIALS));
                out.push_str(random.pick(&["", "", " ", "\n", "user"]));
            }
        }
        // Any code point below the planes whose lead byte is left out, assigned or not.
        10 => {
            for _ in 0..1 + random.below(8) {
                let bound = random.pick(&[0x250, 0x3000, 0x1_0000, 0x3_2000, 0x10_0000]);
                out.extend(char::from_u32(random.below(bound) as u32));
            }
        }
        11 => (0..1 + random.below(6)).for_each(|_| out.extend(char::from_u32(random.below(0x20) as u32))),
        12 => {
            for _ in 0..1 + random.below(12) {
                out.push(
                    random
                        .pick(&['a', 'b', 'S', 'T', '\'', 'e', 'R', 'l', 'L', 'd', ' ', '_', '-', 'ä', 'Ñ', '.', '/']),
                );
            }
        }
        _ => {
            let unit = random
                .pick(&["a", "ab", " ", "\n", "\t", "中", "!", "=", "-", "0", "12", "ha", "哈", "é", "\r\n", " x"]);
            out.push_str(&unit.repeat(1 + random.below(70)));
        }
    }
    out.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_give_equal_texts() {
        assert_eq!(corpus(1, 300), corpus(1, 300));
        assert_ne!(corpus(1, 300), corpus(2, 300));
    }

    #[test]
    fn has_invalid_long_and_special_texts() {
        let texts = corpus(3, 2000);
        assert!(texts.iter().any(|text| std::str::from_utf8(text).is_err()));
        assert!(texts.iter().any(|text| text.len() > 4000));
        assert!(texts.iter().any(|text| text.windows(10).any(|window| window == b"<|im_end|>")));
        assert!(texts.iter().flatten().all(|byte| !(0xF4..0xF8).contains(byte)));
    }
}
