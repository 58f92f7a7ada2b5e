//! A session and the generation that holds it, in one place: the engine's generation borrows its session, which C handles
//! cannot, so the borrow is tied here. This is the one self-reference of the crate.

use std::ptr::NonNull;

use kinglet_engine::session::{GenerateOptions, Generation, Session};

use crate::fence::{Failure, KINGLET_ERR_BUSY, Outcome};

/// What holds the session.
enum Holder {
    Nobody,
    /// A generation that is still feeding its prompt.
    Prompt,
    /// A generation; it borrows `Slot::session`, so it goes first.
    Answer(Box<Generation<'static>>),
}

/// A session of the engine's, which at most one generation holds.
pub struct Slot {
    /// From a `Box`; used by `holder` alone while that is an answer.
    session: NonNull<Session>,
    holder: Holder,
    /// What is next, as of the last feed: `[vocab]`, or empty.
    pub logits: Vec<f32>,
    /// What the adapters in force take.
    pub adapter_bytes: usize,
}

// SAFETY: the session is owned, and it and its generation may be sent (`sendable` holds the compiler to it).
unsafe impl Send for Slot {}

const _: () = {
    const fn sendable<T: Send>() {}
    sendable::<Session>();
    sendable::<Generation<'static>>();
};

impl Slot {
    pub fn new(session: Session) -> Slot {
        let session = NonNull::from(Box::leak(Box::new(session)));
        Slot { session, holder: Holder::Nobody, logits: Vec::new(), adapter_bytes: 0 }
    }

    /// The session.
    ///
    /// # Errors
    /// [`KINGLET_ERR_BUSY`] while a generation holds it.
    pub fn idle(&mut self) -> Outcome<&mut Session> {
        match self.holder {
            // SAFETY: nobody borrows the session, and the result borrows all of `self`.
            Holder::Nobody => Ok(unsafe { self.session.as_mut() }),
            _ => Err(Failure::new(KINGLET_ERR_BUSY, "a generation holds this session; pull it to its end, or free it")),
        }
    }

    /// The session and the place for logits of its last token.
    ///
    /// # Errors
    /// As [`Slot::idle`].
    pub fn idle_with_logits(&mut self) -> Outcome<(&mut Session, &mut Vec<f32>)> {
        self.idle()?;
        // SAFETY: nobody borrows the session, as was just checked, and the result borrows all of `self`.
        Ok((unsafe { self.session.as_mut() }, &mut self.logits))
    }

    /// Hands the session to a generation.
    ///
    /// # Errors
    /// As [`Slot::idle`].
    pub fn hold(&mut self) -> Outcome<&mut Session> {
        self.idle()?;
        self.logits.clear();
        self.holder = Holder::Prompt;
        self.feeding()
    }

    /// The session, for the generation that is feeding its prompt.
    ///
    /// # Errors
    /// None, if asked by that generation.
    pub fn feeding(&mut self) -> Outcome<&mut Session> {
        match self.holder {
            // SAFETY: nobody borrows the session, and the result borrows all of `self`.
            Holder::Prompt => Ok(unsafe { self.session.as_mut() }),
            _ => Err(Failure::argument("this generation has lost its session")),
        }
    }

    /// Begins the answer to `prompt`, for the generation that has fed it.
    ///
    /// # Errors
    /// As [`Session::generate`].
    pub fn answer_to(&mut self, prompt: &[u32], options: GenerateOptions) -> Outcome<()> {
        self.feeding()?;
        // SAFETY: the session lives in its own allocation until `drop`, which ends the generation first; while the
        // generation lives, no other method touches the session.
        let session: &'static mut Session = unsafe { &mut *self.session.as_ptr() };
        self.holder = Holder::Answer(Box::new(session.generate(prompt, options)?));
        Ok(())
    }

    /// The answer, for the generation that began it.
    ///
    /// # Errors
    /// None, if asked by that generation.
    pub fn answer(&mut self) -> Outcome<&mut Generation<'static>> {
        match &mut self.holder {
            Holder::Answer(generation) => Ok(generation),
            _ => Err(Failure::argument("this generation has lost its session")),
        }
    }

    /// Gives back what the session holds of a GPU, whoever holds the session.
    ///
    /// # Errors
    /// As [`Session::park`].
    pub fn park(&mut self) -> Outcome<()> {
        match &mut self.holder {
            Holder::Answer(generation) => generation.park()?,
            // SAFETY: nobody borrows the session, and the result borrows all of `self`.
            Holder::Nobody | Holder::Prompt => unsafe { self.session.as_mut() }.park()?,
        };
        Ok(())
    }

    /// Ends whatever holds the session.
    pub fn let_go(&mut self) {
        self.holder = Holder::Nobody;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.let_go();
        // SAFETY: it came from a `Box`, and nobody borrows it any more.
        drop(unsafe { Box::from_raw(self.session.as_ptr()) });
    }
}
