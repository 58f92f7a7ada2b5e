//! Speculative decoding: tokens are guessed ahead and checked together, in one run that reads the weights once
//! (Leviathan et al. 2023, arXiv:2211.17192).
//!
//! Where guesses come from: from the window, when its last tokens have been there before ("prompt lookup"); or from a
//! smaller model of the same vocabulary.
//!
//! How they are checked: each row's logits go through the sampler as without guessing, and the guess is right if it is
//! the token that was sampled. So the text is what it would have been, token by token, seed by seed, with penalties,
//! Mirostat and all, and no acceptance rule can bend its distribution. The rule of the paper accepts a drafted token with
//! probability `min(1, p/q)` instead, and so changes the text. To come near its rate, the drafting sampler follows the
//! checking one, random state included, and tokens are drawn in a way that gives the same one from distributions that are
//! nearly the same (the coupling of Daliri et al. 2024, arXiv:2408.07978): with d the distance of the two in total
//! variation, a guess is right with probability (1 − d)/(1 + d) at least, where the paper's rule has 1 − d.
//!
//! The CPU computes the rows of a check as if each were run by itself ([`Batch::alone`](crate::tape::Batch::alone)), so
//! their logits are those of decoding bit by bit. On a GPU the kernels for several rows round differently, and a text may
//! part from the one without guessing where two tokens are all but equally likely.

use super::{Model, Session};
use crate::sampling::Sampler;
use crate::{Error, Result};

/// Whether, and by whom, tokens are guessed ahead. The session needs [`SessionOptions::logit_rows`] of at least 2: one
/// less is the most that is guessed at a time.
///
/// [`SessionOptions::logit_rows`]: super::SessionOptions::logit_rows
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculation {
    /// One token at a time.
    #[default]
    Off,
    /// By what followed the last tokens where they stand earlier in the window: for answers that repeat their question,
    /// such as edited code, summaries, extracted facts.
    Lookup,
    /// By the session that [`Session::set_draft`] was given.
    Model,
}

impl Speculation {
    /// The `logit_rows` that suit most: kernels for single rows read the weights once for four of them.
    pub const ROWS: usize = 4;
}

/// Longest run of tokens that is looked for in the window.
const LONGEST: usize = 6;
/// Shortest run: a single token has followers of all kinds.
const SHORTEST: usize = 2;

/// Guesses, and learns how far it pays to guess.
#[derive(Debug)]
pub(super) struct Speculator {
    /// The drafting model's sampler; none for lookup.
    sampler: Option<Sampler>,
    /// Tokens for the drafting model.
    fresh: Vec<u32>,
    /// Tokens that are guessed at a time: two more after a run of right ones, one less after a wrong one, as in Hugging
    /// Face's assisted generation.
    length: usize,
    most: usize,
}

impl Speculator {
    /// # Errors
    /// A session without room for more rows of logits, or without the model that is to draft.
    pub fn new(kind: Speculation, session: &mut Session, sampler: &Sampler) -> Result<Speculator> {
        let most = session.options().logit_rows - 1;
        if most == 0 {
            return Err(Error::argument(format!(
                "to guess ahead, several tokens are checked at once: open the session with logit_rows of at least 2; {} \
                 suits most",
                Speculation::ROWS
            )));
        }
        let sampler = match kind {
            Speculation::Model if session.with_draft().0.is_none() => {
                return Err(Error::argument("no model is there to guess ahead: give the session one with set_draft"));
            }
            Speculation::Model => Some(sampler.clone()),
            _ => None,
        };
        Ok(Speculator { sampler, fresh: Vec::new(), length: most.min(2), most })
    }

    /// Feeds the prompt, whose end is `tokens`, to the drafting model if there is one.
    pub fn prepare(&mut self, session: &mut Session, tokens: &[u32]) -> Result<()> {
        if let (Some(_), (Some(draft), held)) = (&self.sampler, session.with_draft())
            && held.len() + tokens.len() <= draft.options().context
        {
            self.feed(draft, held, tokens)?;
        }
        Ok(())
    }

    /// Appends up to `room` guesses to `tokens`, the one that follows what the window holds.
    pub fn draft(
        &mut self,
        session: &mut Session,
        sampler: &Sampler,
        room: usize,
        tokens: &mut Vec<u32>,
    ) -> Result<()> {
        let room = room.min(self.length);
        if self.sampler.is_none() {
            look_up(session.tokens(), room, tokens);
            return Ok(());
        }
        if let (Some(draft), held) = session.with_draft()
            && held.len() + tokens.len() + room <= draft.options().context
            && room > 0
        {
            self.feed(draft, held, tokens)?;
            self.sample(draft, sampler, room, tokens)?;
        }
        Ok(())
    }

    /// Brings the drafting model's window to `held` and `more`.
    fn feed(&mut self, draft: &mut Session, held: &[u32], more: &[u32]) -> Result<()> {
        let common = draft.keep_prefix(held);
        self.fresh.clear();
        self.fresh.extend_from_slice(&held[common..]);
        self.fresh.extend_from_slice(more);
        draft.feed(&self.fresh).map(|_| ())
    }

    /// Samples from the drafting model, `room` times or until it ends the text.
    fn sample(&mut self, draft: &mut Session, follow: &Sampler, room: usize, tokens: &mut Vec<u32>) -> Result<()> {
        let Some(sampler) = &mut self.sampler else { return Ok(()) };
        sampler.follow(follow);
        for left in (0..room).rev() {
            let token = sampler.sample(draft.logits_row(0)?)?;
            tokens.push(token);
            if left == 0 || draft.model().tokenizer().is_end_of_generation(token) {
                break;
            }
            sampler.accept(token);
            draft.feed(&[token])?;
        }
        Ok(())
    }

    /// Takes notice of how many of the guesses were right.
    pub fn learn(&mut self, drafted: usize, right: usize) {
        self.length = match right == drafted {
            true => (self.length + 2).min(self.most),
            false => (self.length - 1).max(1),
        };
    }
}

/// Appends up to `room` tokens to `tokens`, the one that follows `held`: those that came after the longest of the last
/// tokens' earlier occurrences, the latest of equals.
fn look_up(held: &[u32], room: usize, tokens: &mut Vec<u32>) {
    let &[last] = tokens.as_slice() else { return };
    // Tokens before `end` that are those before the last one.
    let alike = |end: usize| {
        let pairs = held[..end].iter().rev().zip(held.iter().rev());
        1 + pairs.take(LONGEST - 1).take_while(|(a, b)| a == b).count()
    };
    let mut best = (SHORTEST - 1, None);
    for end in (0..held.len()).rev().filter(|i| held[*i] == last) {
        let length = alike(end);
        if length > best.0 {
            best = (length, Some(end + 1));
        }
        if length == LONGEST {
            break;
        }
    }
    if let Some(from) = best.1 {
        for i in from..from + room {
            // Behind the window the text goes on with the last token and the guesses themselves.
            let token = held.get(i).copied().unwrap_or_else(|| tokens[i - held.len()]);
            tokens.push(token);
        }
    }
}

/// Refuses a drafting model whose tokens are not those of `model`.
pub(super) fn same_vocabulary(model: &Model, draft: &Model) -> Result<()> {
    let differ =
        |what: String| Err(Error::argument(format!("the vocabularies of model and draft model differ: {what}")));
    if model.spec().vocab != draft.spec().vocab {
        return differ(format!("{} tokens against {}", model.spec().vocab, draft.spec().vocab));
    }
    let (ours, theirs) = (model.tokenizer(), draft.tokenizer());
    for id in 0..model.spec().vocab as u32 {
        let (a, b) = (ours.token_bytes(id, true), theirs.token_bytes(id, true));
        if a != b {
            let show = |bytes: Option<&[u8]>| {
                bytes.map_or("unused".into(), |bytes| format!("{:?}", String::from_utf8_lossy(bytes)))
            };
            return differ(format!("token {id} is {} against {}", show(a), show(b)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looked_up(held: &[u32], last: u32, room: usize) -> Vec<u32> {
        let mut tokens = vec![last];
        look_up(held, room, &mut tokens);
        tokens.split_off(1)
    }

    #[test]
    fn what_followed_the_longest_repetition_is_guessed() {
        // "2 3" stands twice; before the first stands the 1 that also stands before the last.
        assert_eq!(looked_up(&[1, 2, 3, 4, 5, 9, 2, 3, 6, 7, 1, 2], 3, 3), [4, 5, 9]);
        // Of equally long ones the latest.
        assert_eq!(looked_up(&[2, 3, 4, 2, 3, 5, 8, 2], 3, 2), [5, 8]);
        // One token alone is no repetition, and nothing is guessed without room.
        assert!(looked_up(&[1, 3, 4, 5], 3, 2).is_empty());
        assert!(looked_up(&[2, 3, 4, 2], 3, 0).is_empty());
        assert!(looked_up(&[], 3, 2).is_empty());
    }

    #[test]
    fn a_period_goes_on_beyond_the_window() {
        assert_eq!(looked_up(&[1, 2, 1, 2, 1], 2, 5), [1, 2, 1, 2, 1]);
        assert_eq!(looked_up(&[7, 7], 7, 4), [7, 7, 7, 7]);
    }
}
