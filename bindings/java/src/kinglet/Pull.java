package kinglet;

import java.util.Iterator;
import java.util.NoSuchElementException;
import java.util.function.Supplier;

/** An iterator over what a function gives until it gives null. */
final class Pull<T> implements Iterator<T> {
    private final Supplier<T> source;
    private T ahead;
    private boolean ended;

    Pull(Supplier<T> source) {
        this.source = source;
    }

    @Override
    public boolean hasNext() {
        if (ahead == null && !ended) {
            ahead = source.get();
            ended = ahead == null;
        }
        return ahead != null;
    }

    @Override
    public T next() {
        if (!hasNext()) throw new NoSuchElementException();
        T next = ahead;
        ahead = null;
        return next;
    }
}
