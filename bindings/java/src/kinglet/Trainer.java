package kinglet;

import java.util.Iterator;

/** A training run: each step is taken when its report is asked for. */
public final class Trainer extends Handle implements Iterable<Trainer.Report> {
    /** What a step did. Numbers that were not measured are NaN. */
    public static final class Report {
        /** A step went wrong: an earlier state is in place, with half the learning rate. */
        public final boolean rolledBack;
        /** Steps taken, this one included. */
        public final long step;
        /** Steps in all. */
        public final long steps;
        public final double loss;
        public final double learningRate;
        public final double gradientNorm;
        public final double tokensPerSecond;
        public final double validationLoss;
        public final double rewardAccuracy;
        public final double rewardMargin;
        /** Why the state was rolled back, or null. */
        public final String note;

        Report(long[] counts, double[] numbers, String note) {
            rolledBack = counts[1] == Jni.TRAIN_ROLLED_BACK;
            step = counts[2];
            steps = counts[3];
            loss = numbers[0];
            learningRate = numbers[1];
            gradientNorm = numbers[2];
            tokensPerSecond = numbers[3];
            validationLoss = numbers[4];
            rewardAccuracy = numbers[5];
            rewardMargin = numbers[6];
            this.note = note;
        }
    }

    Trainer(long pointer) {
        super(pointer);
    }

    /** Takes a step; null when all were taken. One that fails or is cancelled has not happened. */
    public Report step() {
        return with(pointer -> {
            long[] counts = new long[4];
            double[] numbers = new double[7];
            byte[] note = Jni.trainerStep(pointer, counts, numbers);
            return counts[0] == 0 ? new Report(counts, numbers, Jni.text(note)) : null;
        });
    }

    @Override
    public Iterator<Report> iterator() {
        return new Pull<>(this::step);
    }

    /** What is ahead, as JSON. */
    public String getInfoJson() {
        return Jni.text(with(Jni::trainerInfoJson));
    }

    /** Writes a checkpoint into the output folder. */
    public void save() {
        with(pointer -> {
            Jni.trainerSave(pointer);
            return null;
        });
    }

    /** The adapter as it is after the steps so far. */
    public Adapter adapter() {
        return new Adapter(with(Jni::trainerAdapter));
    }

    /** Writes what was trained and a report into the output folder; the results as JSON. */
    public String finish() {
        return Jni.text(with(Jni::trainerFinish));
    }

    /** Stops the step that is running, or else the next, from any thread. */
    public void cancel() {
        stopIfOpen();
    }

    @Override
    void stop(long pointer) {
        Jni.trainerCancel(pointer);
    }

    @Override
    void free(long pointer) {
        Jni.trainerFree(pointer);
    }
}
