package kinglet;

import java.util.List;
import java.util.Map;

/** One conversation: a window of tokens that were read. */
public final class Session extends Handle {
    /** How a session is set up; what is not set is a good default. */
    public static final class Options {
        /** Tokens that the window holds; 0: as many as the model was trained for. */
        public int context;
        /** How keys and values are kept: F16, F32 or Q8_0; null for the default. */
        public String kv;
        /** Most tokens of a prompt that are computed at once; 0: 512. */
        public int chunk;

        int kv() {
            if (kv == null) return 0;
            switch (kv) {
                case "F16":
                    return Jni.KV_F16;
                case "F32":
                    return Jni.KV_F32;
                case "Q8_0":
                    return Jni.KV_Q8_0;
                default:
                    throw new IllegalArgumentException("kv is " + kv + "; it must be F16, F32 or Q8_0");
            }
        }
    }

    Session(long pointer) {
        super(pointer);
    }

    /** Begins an answer. The request is the JSON that {@code kinglet_generate} describes in {@code kinglet.h}. */
    public Generation generate(String requestJson) {
        return new Generation(with(pointer -> Jni.generate(pointer, Jni.utf8(requestJson))));
    }

    /** As {@link #generate(String)}, with the request as a map: of strings, numbers, booleans, maps and lists. */
    public Generation generate(Map<String, ?> request) {
        return generate(Json.write(request));
    }

    /** Reads tokens. */
    public void feed(int... tokens) {
        with(pointer -> {
            Jni.sessionFeed(pointer, tokens);
            return null;
        });
    }

    /** The logits of what follows the tokens fed last, one for each token of the vocabulary. */
    public float[] logits() {
        return with(Jni::sessionLogits);
    }

    /** Reads tokens and gives the log-probability of each but the first. */
    public float[] score(int... tokens) {
        return with(pointer -> Jni.sessionScore(pointer, tokens));
    }

    /** What tokens mean together, as a direction of length 1; the window is left as it is. */
    public float[] embed(int... tokens) {
        return with(pointer -> Jni.sessionEmbed(pointer, tokens));
    }

    /** Writes the window to a file. */
    public void save(String path) {
        with(pointer -> {
            Jni.sessionSave(pointer, Jni.utf8(path));
            return null;
        });
    }

    /** Takes the window from a file of {@link #save}, in place of this one. */
    public void load(String path) {
        with(pointer -> {
            Jni.sessionLoad(pointer, Jni.utf8(path));
            return null;
        });
    }

    /** A second session that has read the same tokens. */
    public Session fork() {
        return new Session(with(Jni::sessionFork));
    }

    /** Forgets all tokens. */
    public void reset() {
        rewind(0);
    }

    /** Keeps the first {@code tokens} tokens. */
    public void rewind(int tokens) {
        with(pointer -> {
            Jni.sessionRewind(pointer, tokens);
            return null;
        });
    }

    /** How many tokens the window holds. */
    public int getSize() {
        return Math.toIntExact(with(Jni::sessionTokenCount));
    }

    /** What the session takes now. */
    public Memory getMemory() {
        return new Memory(with(Jni::sessionMemory));
    }

    /** Puts adapters in force in place of those before; none for the model as it is. */
    public void setAdapters(List<Adapter.Scaled> adapters) {
        float[] scales = Adapter.Scaled.scales(adapters);
        Handle.withAll(Adapter.Scaled.adapters(adapters), pointers -> with(pointer -> {
            Jni.sessionSetAdapters(pointer, pointers, scales);
            return null;
        }));
    }

    /** Stops {@link #feed}, {@link #score} or {@link #embed}, if one is running on another thread. */
    public void cancel() {
        stopIfOpen();
    }

    @Override
    void stop(long pointer) {
        Jni.sessionCancel(pointer);
    }

    @Override
    void free(long pointer) {
        Jni.sessionFree(pointer);
    }
}
