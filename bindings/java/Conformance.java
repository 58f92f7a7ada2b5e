// What every binding must do, on the tiny model that `cargo run -p kinglet-ffi --example tiny` writes.
// Conformance VALUES MODEL LESSONS FOLDER, where VALUES is bindings/conformance.tsv

import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import kinglet.*;

final class Conformance {
    private static final Map<String, String> values = new HashMap<>();
    private static String path, lessons, folder;

    private static void require(boolean condition, String what) {
        if (!condition) throw new AssertionError(what);
    }

    private static double[] numbers(String name) {
        return Arrays.stream(values.get(name).split(" ")).mapToDouble(Double::parseDouble).toArray();
    }

    private static int[] ids(String name) {
        return Arrays.stream(values.get(name).split(" ")).mapToInt(Integer::parseInt).toArray();
    }

    private static int number(String name) {
        return Integer.parseInt(values.get(name));
    }

    private static void fails(String code, Runnable work, String word) {
        try {
            work.run();
        } catch (KingletException error) {
            require(error.getCode() == number(code) && error.getMessage().contains(word), error.toString());
            return;
        }
        throw new AssertionError("nothing was wrong, but " + code + " was to come");
    }

    private static Model.Options cpu() {
        Model.Options options = new Model.Options();
        options.backend = "cpu";
        options.threads = 2;
        return options;
    }

    private static int[] tokensOf(Generation answer) {
        List<Integer> tokens = new ArrayList<>();
        for (Piece piece : answer) for (int token : piece.tokens) tokens.add(token);
        return tokens.stream().mapToInt(Integer::intValue).toArray();
    }

    private static int[] answerOf(Session session, String request) {
        try (Generation answer = session.generate(values.get(request))) {
            return tokensOf(answer);
        }
    }

    private static void tokens(Model model) {
        int[] ids = model.tokenize(values.get("text"));
        require(Arrays.equals(ids, ids("text_tokens")), "tokens of the text");
        require(model.detokenize(ids).equals(values.get("text")), "text of the tokens");
        List<Byte> bytes = new ArrayList<>();
        for (int id : ids) for (byte one : model.tokenBytes(id)) bytes.add(one);
        byte[] text = new byte[bytes.size()];
        for (int i = 0; i < text.length; i++) text[i] = bytes.get(i);
        require(new String(text, StandardCharsets.UTF_8).equals(values.get("text")), "bytes of the tokens");
        require(model.tokenize("").length == 0, "no text has no tokens");
    }

    private static void answers(Model model) {
        try (Session session = model.session()) {
            require(Arrays.equals(answerOf(session, "greedy_request"), ids("greedy_tokens")), "greedy tokens");
            for (int again = 0; again < 2; again++) {
                try (Generation answer = session.generate(values.get("chat_request"))) {
                    require(Arrays.equals(tokensOf(answer), ids("chat_tokens")), "tokens of the chat");
                    require(answer.getEnd() == EndReason.LENGTH, "end of the chat");
                    require(answer.getPromptTokens() == number("chat_prompt_tokens"), "prompt of the chat");
                    require(again == 0 || answer.getReusedTokens() == answer.getPromptTokens() - 1, "what is read is kept");
                }
            }
            // The same request from a map.
            Map<String, Object> request = Map.of(
                    "messages", List.of(Map.of("role", "user", "content", "hello you")), "max_tokens", 8,
                    "ignore_end", true, "sampling", Map.of("temperature", 0));
            try (Generation answer = session.generate(request)) {
                require(Arrays.equals(tokensOf(answer), ids("chat_tokens")), "tokens of the chat from a map");
            }
            session.reset();
            int[] prompt = ids("text_tokens");
            int last = prompt[prompt.length - 1];
            session.feed(Arrays.copyOf(prompt, prompt.length - 1));
            try (Session fork = session.fork()) {
                fork.feed(last);
                session.feed(last);
                require(Arrays.equals(fork.logits(), session.logits()), "logits of the fork");
                session.rewind(1);
                require(session.getSize() == 1 && fork.getSize() == prompt.length, "a fork goes its own way");
                float[] scores = fork.score(prompt);
                require(scores.length == prompt.length - 1, "a score for each token but the first");
                for (float score : scores) require(score < 0, "a log-probability");
            }
        }
    }

    private static void splitUtf8(Model model) {
        List<String> pieces = new ArrayList<>();
        try (Session session = model.session(); Generation answer = session.generate(values.get("emoji_request"))) {
            for (Piece piece : answer) pieces.add(piece.text);
        }
        require(pieces.size() == number("emoji_pieces"), "pieces of the emoji");
        require(String.join("", pieces).equals(values.get("emoji_text")), "text of the emoji");
        for (String piece : pieces) require(piece.isEmpty() || piece.equals(values.get("emoji_text")), "a character was split");
    }

    private static void structured(Model model) {
        try (Session session = model.session()) {
            for (int again = 0; again < 5; again++) {
                try (Generation answer = session.generate(values.get("schema_request"))) {
                    String text = answer.read();
                    require(text.startsWith("{") && text.endsWith("}") && text.contains("\"age\""), text);
                    require(answer.getEnd() == EndReason.END_OF_TEXT, "the end of the schema is the end");
                    String message = answer.getMessageJson();
                    require(message.startsWith("{\"role\":\"assistant\",\"content\":\"{"), message);
                }
            }
            fails("unknown_key_code", () -> session.generate(values.get("wrong_schema_request")), values.get("wrong_schema"));
        }
    }

    private static void errors(Model model) {
        try (Session session = model.session()) {
            fails("missing_model_code", () -> Model.open("/no/such/model"), "");
            Model.Options options = new Model.Options();
            options.backend = "cpu";
            options.gpuLayers = 1;
            options.gpuImport = true;
            try (Model onCpu = Model.open(path, options)) {
                fails("wrong_options_code", onCpu::session, values.get("layers_on_cpu"));
            }
            options.tuningFolder = "";
            fails("wrong_options_code", () -> Model.open(path, options), values.get("empty_folder"));
            fails("unknown_key_code", () -> session.generate(values.get("unknown_key_request")), values.get("unknown_key"));
            int[] many = new int[100000];
            Arrays.fill(many, 1);
            fails("context_full_code", () -> session.feed(many), "");
            try (Generation answer = session.generate(values.get("greedy_request"))) {
                fails("busy_code", session::reset, "");
                answer.read();
            }
            session.reset();
        }
    }

    private static void cancels(Model model) throws InterruptedException {
        try (Session session = model.session()) {
            try (Generation answer = session.generate(values.get("endless_request"))) {
                require(answer.next() != null, "a first piece");
                Thread thread = new Thread(answer::cancel);
                thread.start();
                thread.join();
                answer.read();
                require(answer.getEnd() == EndReason.CANCELLED, "the end of a cancelled answer");
            }
            // Closed while another thread is in a call.
            Generation answer = session.generate(values.get("endless_request"));
            Thread reader = new Thread(() -> {
                try {
                    answer.read();
                } catch (IllegalStateException closed) {
                    // It was closed between two calls.
                }
            });
            reader.start();
            Thread.sleep(5);
            answer.close();
            reader.join();
            session.reset();
        }
    }

    private static void windows(Model model) {
        try (Session session = model.session(); Session other = model.session()) {
            int[] prompt = ids("text_tokens");
            int last = prompt[prompt.length - 1];
            double length = 0;
            for (float x : session.embed(prompt)) length += (double) x * x;
            require(Math.abs(length - 1) < 1e-4 && session.getSize() == 0, "a direction, and the window as it was");
            session.feed(prompt);
            session.save(folder + ".window");
            other.load(folder + ".window");
            fails("damaged_window_code", () -> other.load(path), "");
            session.feed(last);
            other.feed(last);
            require(Arrays.equals(session.logits(), other.logits()), "a window from a file goes on");

            try (Generation answer = other.generate(values.get("greedy_request"))) {
                model.suspend();
                fails("suspended_code", answer::next, "");
                model.resume();
                require(Arrays.equals(tokensOf(answer), ids("greedy_tokens")), "an answer goes on after suspending");
            }
            require(model.trim() > 0, "sessions have memory to give back");
            require(Arrays.equals(answerOf(other, "greedy_request"), ids("greedy_tokens")), "and take it anew");
        }
    }

    private static void anyOrder() {
        for (int[] order : new int[][] {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}}) {
            Model model = Model.open(path, cpu());
            Session session = model.session();
            Generation answer = session.generate(values.get("greedy_request"));
            Handle[] objects = {model, session, answer};
            for (int which : order) {
                if (which == 2) require(Arrays.equals(tokensOf(answer), ids("greedy_tokens")), "an answer without its parents");
                objects[which].close();
            }
        }
    }

    private static void training(Model model) {
        String config = values.get("training_config");
        config = "{\"data\": \"" + lessons + "\", \"output\": \"" + folder + "\", " + config.substring(1);
        double[] losses = numbers("training_losses");
        try (Trainer trainer = model.train(config)) {
            trainer.cancel();
            fails("cancelled_code", trainer::step, "");
            int step = 0;
            for (Trainer.Report report : trainer) {
                require(report.step == step + 1 && report.steps == losses.length && !report.rolledBack, "the step");
                require(Math.abs(report.loss - losses[step]) < 0.02, "the loss of the step: " + report.loss);
                step++;
            }
            require(step == losses.length && trainer.finish().contains("adapter.gguf"), "the training's end");
            try (Adapter adapter = trainer.adapter();
                    Adapter file = model.adapter(folder + "/adapter.gguf");
                    Session session = model.session()) {
                // An adapter and its opposite are the model as it is.
                session.setAdapters(List.of(adapter.times(1), file.times(-1)));
                require(Arrays.equals(answerOf(session, "greedy_request"), ids("greedy_tokens")), "an adapter and its opposite");
            }
        }
    }

    public static void main(String[] arguments) throws IOException, InterruptedException {
        for (String line : Files.readAllLines(Path.of(arguments[0]), StandardCharsets.UTF_8)) {
            String[] pair = line.split("\t", 2);
            if (pair.length == 2) values.put(pair[0], pair[1]);
        }
        path = arguments[1];
        lessons = arguments[2];
        folder = arguments[3];
        require(!Kinglet.version().isEmpty() && Kinglet.buildJson().contains("\"abi\""), "a version");
        require(Kinglet.devicesJson().contains("\"cpu\""), "a CPU");
        try (Model model = Model.open(path, cpu()); Session session = model.session()) {
            require(model.getInfoJson().contains("\"llama\""), "the family");
            require(model.getChatTemplate().contains("im_start"), "the template");
            long most = Kinglet.estimate(path, cpu(), new Session.Options()).total;
            require(most >= session.getMemory().total, "an estimate");
            tokens(model);
            answers(model);
            splitUtf8(model);
            structured(model);
            errors(model);
            cancels(model);
            windows(model);
            training(model);
        }
        anyOrder();
        try (Model model = Model.open(Files.readAllBytes(Path.of(path)), cpu()); Session session = model.session()) {
            require(Arrays.equals(answerOf(session, "greedy_request"), ids("greedy_tokens")), "a model in memory");
        }
        System.out.println("conforms");
    }
}
