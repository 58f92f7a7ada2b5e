package kinglet;

/** Why an answer ended. */
public enum EndReason {
    /** The model ended its answer. */
    END_OF_TEXT(Jni.END_OF_TEXT),
    /** As many tokens as were asked for. */
    LENGTH(Jni.END_LENGTH),
    /** A stop text came up. */
    STOP(Jni.END_STOP),
    /** The window is full. */
    CONTEXT_FULL(Jni.END_CONTEXT_FULL),
    /** It was cancelled. */
    CANCELLED(Jni.END_CANCELLED);

    private final int code;

    EndReason(int code) {
        this.code = code;
    }

    static EndReason of(long code) {
        for (EndReason reason : values()) if (reason.code == code) return reason;
        return null;
    }
}
