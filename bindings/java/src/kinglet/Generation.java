package kinglet;

import java.util.Iterator;

/** An answer under way: its pieces, one after the other, which can be walked once. The session is busy until its end. */
public final class Generation extends Handle implements Iterable<Piece> {
    private static final int STATUS = 0, KIND = 1, END = 2, PROMPT = 3, REUSED = 4, PREFILLED = 5, OUTPUT = 6;

    private final long[] counts = new long[7];
    private final double[] times = new double[2];
    private volatile EndReason end;

    Generation(long pointer) {
        super(pointer);
    }

    /** The next piece; null when the answer has ended. */
    public Piece next() {
        return with(pointer -> {
            while (true) {
                Piece piece = Jni.generationNext(pointer, counts, times);
                if (piece != null || counts[STATUS] != 0) return piece;
                if (counts[KIND] == Jni.EVENT_END) end = EndReason.of(counts[END]);
            }
        });
    }

    @Override
    public Iterator<Piece> iterator() {
        return new Pull<>(this::next);
    }

    /** The rest of the answer. */
    public String read() {
        StringBuilder whole = new StringBuilder();
        for (Piece piece : this) whole.append(piece.text);
        return whole.toString();
    }

    /** The answer so far as a message, with calls of tools told from text, as JSON; it may go back into {@code messages}. */
    public String getMessageJson() {
        return Jni.text(with(Jni::generationMessageJson));
    }

    /** Why the answer ended; null before. */
    public EndReason getEnd() {
        return end;
    }

    /** Tokens of the prompt. */
    public int getPromptTokens() {
        return (int) counts[PROMPT];
    }

    /** Of these, read before and kept in the window. */
    public int getReusedTokens() {
        return (int) counts[REUSED];
    }

    /** Of these, read by now. */
    public int getPrefilledTokens() {
        return (int) counts[PREFILLED];
    }

    /** Tokens generated so far. */
    public int getOutputTokens() {
        return (int) counts[OUTPUT];
    }

    /** Time for the prompt and the first token so far. */
    public double getPrefillMs() {
        return times[0];
    }

    /** Time for the further tokens so far. */
    public double getDecodeMs() {
        return times[1];
    }

    /** Ends the answer, from any thread. */
    public void cancel() {
        stopIfOpen();
    }

    @Override
    void stop(long pointer) {
        Jni.generationCancel(pointer);
    }

    @Override
    void free(long pointer) {
        Jni.generationFree(pointer);
    }
}
