package kinglet;

/** Bytes that a model with one session takes. */
public final class Memory {
    /** The mapped file: shared by all processes, and taken back by the system when it must; on a GPU what it reads of it. */
    public final long weights;
    /** Keys and values; these grow as the window fills. */
    public final long kvCache;
    /** Activations, logits, tables. */
    public final long activations;
    /** Scratch of all threads. */
    public final long scratch;
    /** Adapters in force. */
    public final long adapters;
    /** All of these. */
    public final long total;
    /** Of the weights what is read in place from the mapped file; the rest of the total is allocated. */
    public final long mapped;

    /** In the order of kinglet_memory. */
    Memory(long[] bytes) {
        weights = bytes[0];
        kvCache = bytes[1];
        activations = bytes[2];
        scratch = bytes[3];
        adapters = bytes[4];
        total = bytes[5];
        mapped = bytes[6];
    }
}
