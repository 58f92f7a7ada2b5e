package kinglet;

/** A piece of an answer. */
public final class Piece {
    /** Whole characters; empty while one is incomplete. */
    public final String text;
    /** The tokens behind the text. */
    public final int[] tokens;

    /** Made by the C side. */
    Piece(byte[] text, int[] tokens) {
        this.text = Jni.text(text);
        this.tokens = tokens;
    }
}
