package kinglet;

import java.lang.annotation.Native;

/** What the library says went wrong. */
public final class KingletException extends RuntimeException {
    private static final long serialVersionUID = 1;

    /** An argument is wrong. */
    @Native public static final int ARG = -1;
    /** The operating system refused a file operation. */
    @Native public static final int IO = -2;
    /** A file is damaged or of another kind. */
    @Native public static final int FORMAT = -3;
    /** Valid, but this build or version cannot do it. */
    @Native public static final int UNSUPPORTED = -4;
    /** The memory budget, or the system's memory, does not hold it. */
    @Native public static final int MEMORY = -5;
    /** The session's window does not hold so many tokens. */
    @Native public static final int CONTEXT_FULL = -6;
    /** Another call, or a generation, is using the object. */
    @Native public static final int BUSY = -7;
    /** Somebody asked to stop. */
    @Native public static final int CANCELLED = -8;
    /** The GPU or its driver failed. */
    @Native public static final int DEVICE_LOST = -9;
    /** The model is suspended: call again when it is resumed. */
    @Native public static final int SUSPENDED = -10;
    /** A computation gave NaN or infinity. */
    @Native public static final int NUMERIC = -13;
    /** A fault in the library; the object can only be closed. */
    @Native public static final int INTERNAL = -99;

    private final int code;

    /** Made by the C side, with a message in UTF-8. */
    KingletException(int code, byte[] message) {
        super(Jni.text(message));
        this.code = code;
    }

    /** One of the numbers above. */
    public int getCode() {
        return code;
    }
}
