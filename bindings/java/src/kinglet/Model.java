package kinglet;

import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.Map;

/** Weights with tokenizer and chat template, shared by any number of sessions. */
public final class Model extends Handle {
    /** How a model is opened; what is not set is a good default. */
    public static final class Options {
        /** auto (the best GPU, else the CPU), cpu, gpu or gpu:1. */
        public String backend = "auto";
        /** Of each session and trainer; 0: one per core. */
        public int threads;
        /** Most bytes that the file and one session, or trainer, take together; 0: no limit. */
        public long memoryBudget;
        /** Most bytes for prompts that were read, so that sessions that begin alike share the work; 0: none. */
        public long prefixCache;
        /** How many of the last layers a GPU runs, while the CPU runs the others; 0: all, or as many as its memory holds. */
        public int gpuLayers;
        /** Most bytes of a GPU's memory that a session takes: it gets as many layers as that holds; 0: no limit. */
        public long gpuMemory;
        /** Read the weights on a GPU from the mapped file, without a copy, if its driver allows it; for one in the processor. */
        public boolean gpuImport;
        /** Where the times of a GPU's kernels are kept, which are timed once then, and the quickest taken; null: none are timed. */
        public String tuningFolder;
        /** Let products of eight bits compete too: quicker for some, but rounded more. With a folder only. */
        public boolean tuneInt8;
        /** Read all weights on opening, and refuse NaN and infinity. */
        public boolean validate;
        /** Read the file into memory instead of mapping it: for files that others change. */
        public boolean copy;

        byte[] backend() {
            return Jni.utf8(backend);
        }

        byte[] tuningFolder() {
            return Jni.utf8(tuningFolder);
        }

        /** The numbers of kinglet_model_options, in the order that kinglet_jni.c has. */
        long[] numbers(boolean copy) {
            int flags = (validate ? Jni.MODEL_VALIDATE : 0) | (copy ? Jni.MODEL_COPY : 0);
            int tuning = tuneInt8 ? Jni.TUNE_INT8 : 0;
            int pages = gpuImport ? 1 : 0;
            return new long[] {flags, threads, memoryBudget, prefixCache, gpuLayers, gpuMemory, tuning, pages};
        }
    }

    private Model(long pointer) {
        super(pointer);
    }

    /** Opens the GGUF file at {@code path} as the defaults say. */
    public static Model open(String path) {
        return open(path, new Options());
    }

    /** Opens the GGUF file at {@code path}; of a model in several files, any one of them. */
    public static Model open(String path, Options o) {
        return new Model(Jni.modelOpen(Jni.utf8(path), o.backend(), o.tuningFolder(), o.numbers(o.copy)));
    }

    /**
     * Opens the model that takes {@code length} bytes (0: all) from {@code offset} of an open file, such as an asset in a
     * package. The descriptor may be closed afterwards.
     */
    public static Model open(int descriptor, long offset, long length, Options o) {
        long[] numbers = o.numbers(o.copy);
        return new Model(Jni.modelOpenFd(descriptor, offset, length, o.backend(), o.tuningFolder(), numbers));
    }

    /** Opens the model in {@code bytes}, which are copied. */
    public static Model open(byte[] bytes, Options o) {
        return new Model(Jni.modelOpenMemory(bytes, o.backend(), o.tuningFolder(), o.numbers(true)));
    }

    /** What the model is, as JSON. */
    public String getInfoJson() {
        return Jni.text(with(Jni::modelInfoJson));
    }

    /** Its chat template; null for a base model. */
    public String getChatTemplate() {
        return Jni.text(with(Jni::modelChatTemplate));
    }

    /** The tokens of a text. */
    public int[] tokenize(String text) {
        return tokenize(text, false, false);
    }

    /**
     * The tokens of a text; {@code special} adds BOS and EOS where the model wants them, {@code control} reads control tokens,
     * which is not for text from people.
     */
    public int[] tokenize(String text, boolean special, boolean control) {
        int flags = (special ? Jni.TOKENIZE_SPECIAL : 0) | (control ? Jni.TOKENIZE_CONTROL : 0);
        return with(pointer -> Jni.tokenize(pointer, text.getBytes(StandardCharsets.UTF_8), flags));
    }

    /** The text of tokens. */
    public String detokenize(int... tokens) {
        return Jni.text(with(pointer -> Jni.detokenize(pointer, tokens, 0)));
    }

    /** As {@link #detokenize(int...)}, with the text of control tokens, which otherwise have none. */
    public String detokenizeWithControl(int... tokens) {
        return Jni.text(with(pointer -> Jni.detokenize(pointer, tokens, Jni.DETOKENIZE_CONTROL)));
    }

    /** The bytes of one token, which may be a part of a character. */
    public byte[] tokenBytes(int token) {
        return with(pointer -> Jni.tokenBytes(pointer, token, 0));
    }

    /** Gives back memory that can be had again, and says how many bytes: for {@code onTrimMemory}. */
    public long trim() {
        return with(Jni::modelTrim);
    }

    /**
     * Lets nothing compute with the model until {@link #resume}: what would fails with {@link KingletException#SUSPENDED}.
     * Returns when nothing does any more.
     */
    public void suspend() {
        with(pointer -> {
            Jni.modelSuspend(pointer);
            return null;
        });
    }

    /** Takes {@link #suspend} back. */
    public void resume() {
        with(pointer -> {
            Jni.modelResume(pointer);
            return null;
        });
    }

    /** A conversation as the defaults say. */
    public Session session() {
        return session(new Session.Options());
    }

    /** A conversation. */
    public Session session(Session.Options o) {
        return new Session(with(pointer -> Jni.sessionCreate(pointer, o.context, o.kv(), o.chunk)));
    }

    /** The LoRA adapter at {@code path}: a GGUF file, or a folder as PEFT writes it. */
    public Adapter adapter(String path) {
        return new Adapter(with(pointer -> Jni.adapterOpen(pointer, Jni.utf8(path))));
    }

    /** Writes a new model file with adapters inside; changed matrices get the type {@code quant}, or keep theirs for null. */
    public void merge(List<Adapter.Scaled> adapters, String path, String quant) {
        float[] scales = Adapter.Scaled.scales(adapters);
        Handle.withAll(Adapter.Scaled.adapters(adapters), pointers -> with(pointer -> {
            Jni.adapterMerge(pointer, pointers, scales, Jni.utf8(path), Jni.utf8(quant));
            return null;
        }));
    }

    /** A training. The configuration is the JSON that {@code kinglet_trainer_create} describes in {@code kinglet.h}. */
    public Trainer train(String configJson) {
        return new Trainer(with(pointer -> Jni.trainerCreate(pointer, Jni.utf8(configJson))));
    }

    /** As {@link #train(String)}, with the configuration as a map: of strings, numbers, booleans, maps and lists. */
    public Trainer train(Map<String, ?> config) {
        return train(Json.write(config));
    }

    @Override
    void free(long pointer) {
        Jni.modelFree(pointer);
    }
}
