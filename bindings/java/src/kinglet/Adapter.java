package kinglet;

import java.util.ArrayList;
import java.util.List;

/** A LoRA adapter: small trained corrections to a model. */
public final class Adapter extends Handle {
    Adapter(long pointer) {
        super(pointer);
    }

    /** What the adapter is, as JSON. */
    public String getInfoJson() {
        return Jni.text(with(Jni::adapterInfoJson));
    }

    /** This adapter times a factor, where several are put in force. */
    public Scaled times(float scale) {
        return new Scaled(this, scale);
    }

    @Override
    void free(long pointer) {
        Jni.adapterFree(pointer);
    }

    /** An adapter with its factor. */
    public static final class Scaled {
        final Adapter adapter;
        final float scale;

        Scaled(Adapter adapter, float scale) {
            this.adapter = adapter;
            this.scale = scale;
        }

        static List<Adapter> adapters(List<Scaled> all) {
            List<Adapter> adapters = new ArrayList<>();
            for (Scaled one : all) adapters.add(one.adapter);
            return adapters;
        }

        static float[] scales(List<Scaled> all) {
            float[] scales = new float[all.size()];
            for (int i = 0; i < scales.length; i++) scales[i] = all.get(i).scale;
            return scales;
        }
    }
}
