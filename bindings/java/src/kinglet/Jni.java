package kinglet;

import java.lang.annotation.Native;
import java.nio.charset.StandardCharsets;

/**
 * The functions of {@code jni/kinglet_jni.c}, one for one those of {@code kinglet.h}. Text goes both ways as UTF-8, since JNI's
 * own strings are not quite that; on the way in it ends with a NUL. An error is a {@link KingletException}.
 */
final class Jni {
    // The numbers of kinglet.h; the C file does not compile where they differ.
    @Native static final int MODEL_VALIDATE = 1;
    @Native static final int MODEL_COPY = 2;
    @Native static final int TUNE_INT8 = 2;
    @Native static final int TOKENIZE_SPECIAL = 1;
    @Native static final int TOKENIZE_CONTROL = 2;
    @Native static final int DETOKENIZE_CONTROL = 1;
    @Native static final int KV_F16 = 1;
    @Native static final int KV_F32 = 2;
    @Native static final int KV_Q8_0 = 3;
    @Native static final int EVENT_TEXT = 1;
    @Native static final int EVENT_END = 3;
    @Native static final int END_OF_TEXT = 1;
    @Native static final int END_LENGTH = 2;
    @Native static final int END_STOP = 3;
    @Native static final int END_CONTEXT_FULL = 4;
    @Native static final int END_CANCELLED = 5;
    @Native static final int TRAIN_ROLLED_BACK = 2;

    static {
        // A path for programs that bring the library along; else java.library.path, as on Android.
        String path = System.getProperty("kinglet.jni");
        if (path != null) System.load(path);
        else System.loadLibrary("kinglet_jni");
    }

    private Jni() {}

    /** Text as C has it. */
    static byte[] utf8(String text) {
        if (text == null) return null;
        if (text.indexOf('\0') >= 0) throw new IllegalArgumentException("the text has a NUL in it");
        return (text + '\0').getBytes(StandardCharsets.UTF_8);
    }

    /** Text of the library's. */
    static String text(byte[] text) {
        return text == null ? null : new String(text, StandardCharsets.UTF_8);
    }

    static native byte[] version();

    static native byte[] buildJson();

    static native byte[] devicesJson();

    /** The fields of kinglet_memory. */
    static native long[] estimate(
            byte[] path, byte[] backend, byte[] tuningFolder, long[] options, int context, int kv, int chunk);

    static native long modelOpen(byte[] path, byte[] backend, byte[] tuningFolder, long[] options);

    static native long modelOpenFd(
            int fd, long offset, long length, byte[] backend, byte[] tuningFolder, long[] options);

    static native long modelOpenMemory(byte[] bytes, byte[] backend, byte[] tuningFolder, long[] options);

    static native void modelFree(long model);

    static native long modelTrim(long model);

    static native void modelSuspend(long model);

    static native void modelResume(long model);

    static native byte[] modelInfoJson(long model);

    static native byte[] modelChatTemplate(long model);

    static native int[] tokenize(long model, byte[] text, int flags);

    static native byte[] detokenize(long model, int[] tokens, int flags);

    static native byte[] tokenBytes(long model, int token, int flags);

    static native long sessionCreate(long model, int context, int kv, int chunk);

    static native void sessionFree(long session);

    static native long sessionFork(long session);

    static native void sessionRewind(long session, long tokens);

    static native long sessionTokenCount(long session);

    /** The fields of kinglet_memory. */
    static native long[] sessionMemory(long session);

    static native void sessionSetAdapters(long session, long[] adapters, float[] scales);

    static native void sessionFeed(long session, int[] tokens);

    static native float[] sessionLogits(long session);

    static native float[] sessionScore(long session, int[] tokens);

    static native float[] sessionEmbed(long session, int[] tokens);

    static native void sessionSave(long session, byte[] path);

    static native void sessionLoad(long session, byte[] path);

    static native void sessionCancel(long session);

    static native long generate(long session, byte[] request);

    /**
     * Takes an event. {@code counts} gets the status, kind, end_reason and the numbers of tokens, {@code times} the
     * milliseconds. Null for an event without text.
     */
    static native Piece generationNext(long generation, long[] counts, double[] times);

    static native byte[] generationMessageJson(long generation);

    static native void generationCancel(long generation);

    static native void generationFree(long generation);

    static native long adapterOpen(long model, byte[] path);

    static native void adapterFree(long adapter);

    static native byte[] adapterInfoJson(long adapter);

    static native void adapterMerge(long model, long[] adapters, float[] scales, byte[] path, byte[] quant);

    static native long trainerCreate(long model, byte[] config);

    static native void trainerFree(long trainer);

    static native byte[] trainerInfoJson(long trainer);

    /**
     * Takes a step. {@code counts} gets the status, kind, step and steps, {@code numbers} the rest of the report; the note is
     * returned.
     */
    static native byte[] trainerStep(long trainer, long[] counts, double[] numbers);

    static native void trainerSave(long trainer);

    static native long trainerAdapter(long trainer);

    static native byte[] trainerFinish(long trainer);

    static native void trainerCancel(long trainer);
}
