package kinglet;

/** The library itself. */
public final class Kinglet {
    private Kinglet() {}

    /** The version of the library. */
    public static String version() {
        return Jni.text(Jni.version());
    }

    /** How the library was built and what it uses of this processor, as JSON. */
    public static String buildJson() {
        return Jni.text(Jni.buildJson());
    }

    /** The devices that models can run on, as JSON; {@code backend} of each is what {@link Model.Options} take. */
    public static String devicesJson() {
        return Jni.text(Jni.devicesJson());
    }

    /** What opening a model and one session with a full window would take. Nothing is allocated. */
    public static Memory estimate(String path, Model.Options model, Session.Options session) {
        byte[] file = Jni.utf8(path), backend = model.backend(), folder = model.tuningFolder();
        long[] numbers = model.numbers(model.copy);
        return new Memory(
                Jni.estimate(file, backend, folder, numbers, session.context, session.kv(), session.chunk));
    }
}
