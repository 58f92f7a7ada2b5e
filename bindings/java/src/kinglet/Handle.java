package kinglet;

import java.util.List;
import java.util.concurrent.locks.ReentrantReadWriteLock;
import java.util.function.Function;
import java.util.function.LongFunction;

/**
 * Something that lives in the library until it is closed. Objects may be closed in any order, and from any thread: closing one
 * stops a call that is running on it, and waits for its end.
 */
public abstract class Handle implements AutoCloseable {
    // Calls share it; closing takes it alone.
    private final ReentrantReadWriteLock lock = new ReentrantReadWriteLock();
    private long pointer;

    Handle(long pointer) {
        this.pointer = pointer;
    }

    /** Frees the object in the library. */
    abstract void free(long pointer);

    /** Asks a running call to end soon. */
    void stop(long pointer) {}

    /** Calls with the pointer, which lives as long as the call. */
    final <T> T with(LongFunction<T> call) {
        long pointer = hold();
        try {
            return call.apply(pointer);
        } finally {
            lock.readLock().unlock();
        }
    }

    /** As {@link #with}, with the pointers of several. */
    static <T> T withAll(List<? extends Handle> handles, Function<long[], T> call) {
        long[] pointers = new long[handles.size()];
        int held = 0;
        try {
            for (Handle handle : handles) {
                pointers[held] = handle.hold();
                held++;
            }
            return call.apply(pointers);
        } finally {
            for (Handle handle : handles.subList(0, held)) handle.lock.readLock().unlock();
        }
    }

    private long hold() {
        lock.readLock().lock();
        if (pointer != 0) return pointer;
        lock.readLock().unlock();
        throw new IllegalStateException("this object is closed");
    }

    /** Stops what is running on the object, if it is not closed. */
    final void stopIfOpen() {
        lock.readLock().lock();
        try {
            if (pointer != 0) stop(pointer);
        } finally {
            lock.readLock().unlock();
        }
    }

    @Override
    public void close() {
        stopIfOpen();
        lock.writeLock().lock();
        try {
            if (pointer != 0) free(pointer);
            pointer = 0;
        } finally {
            lock.writeLock().unlock();
        }
    }
}
