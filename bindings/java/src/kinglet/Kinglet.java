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
        byte[] backend = Jni.utf8(model.backend);
        return new Memory(Jni.estimate(
                Jni.utf8(path), backend, model.threads, session.context, session.kv(), session.chunk));
    }
}
