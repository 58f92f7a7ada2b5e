// What every binding must do, on the tiny model that `cargo run -p kinglet-ffi --example tiny` writes.
// conformance VALUES MODEL LESSONS FOLDER, where VALUES is bindings/conformance.tsv
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <thread>

#include "kinglet.hpp"

namespace {

std::map<std::string, std::string> values;
std::string path, lessons, folder;

void require(bool condition, const char *what) {
    if (condition) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

template <typename Number>
std::vector<Number> numbers(const std::string &name) {
    std::istringstream words(values.at(name));
    std::vector<Number> all;
    for (Number number; words >> number;) all.push_back(number);
    return all;
}

template <typename Function>
void fails(const std::string &code, Function function, const std::string &word = "") {
    try {
        function();
    } catch (const kinglet::Error &error) {
        require(error.code() == std::stoi(values.at(code)), error.what());
        require(std::string(error.what()).find(word) != std::string::npos, error.what());
        return;
    }
    require(false, ("nothing was wrong: " + code).c_str());
}

kinglet::Model open_model() {
    kinglet_model_options options = kinglet::model_options();
    options.backend = "cpu";
    options.threads = 2;
    return kinglet::Model(path, options);
}

std::vector<int32_t> tokens_of(kinglet::Generation &answer) {
    std::vector<int32_t> tokens;
    for (const kinglet::Piece &piece : answer) tokens.insert(tokens.end(), piece.tokens, piece.tokens + piece.n_tokens);
    return tokens;
}

std::vector<int32_t> answer_of(kinglet::Session &session, const char *name) {
    kinglet::Generation answer = session.generate(values.at(name));
    return tokens_of(answer);
}

void tokens(const kinglet::Model &model) {
    std::vector<int32_t> ids = model.tokenize(values.at("text"));
    require(ids == numbers<int32_t>("text_tokens"), "tokens of the text");
    require(model.detokenize(ids) == values.at("text"), "text of the tokens");
    require(model.tokenize("").empty(), "no text has no tokens");
}

void answers(const kinglet::Model &model) {
    kinglet::Session session = model.session();
    require(answer_of(session, "greedy_request") == numbers<int32_t>("greedy_tokens"), "greedy tokens");
    for (int again = 0; again < 2; again++) {
        kinglet::Generation answer = session.generate(values.at("chat_request"));
        require(tokens_of(answer) == numbers<int32_t>("chat_tokens"), "tokens of the chat");
        require(answer.event().end_reason == KINGLET_END_LENGTH, "end of the chat");
        require(answer.event().prompt_tokens == std::stoi(values.at("chat_prompt_tokens")), "prompt of the chat");
        require(!again || answer.event().reused_tokens == answer.event().prompt_tokens - 1, "what is read is kept");
    }
    session.reset();
    std::vector<int32_t> prompt = numbers<int32_t>("text_tokens");
    const std::vector<int32_t> last(1, prompt.back());
    session.feed(std::vector<int32_t>(prompt.begin(), prompt.end() - 1));
    kinglet::Session fork = session.fork();
    fork.feed(last);
    session.feed(last);
    require(fork.logits() == session.logits(), "logits of the fork");
    session.rewind(1);
    require(session.size() == 1 && fork.size() == prompt.size(), "a fork goes its own way");
    for (float score : fork.score(prompt)) require(score < 0, "a log-probability");
}

void split_utf8(const kinglet::Model &model) {
    kinglet::Session session = model.session();
    int pieces = 0;
    std::string text;
    for (const kinglet::Piece &piece : session.generate(values.at("emoji_request"))) {
        require(piece.text.empty() || piece.text == values.at("emoji_text"), "a character was split");
        text += piece.text;
        pieces++;
    }
    require(text == values.at("emoji_text") && pieces == std::stoi(values.at("emoji_pieces")), "pieces of the emoji");
}

void structured(const kinglet::Model &model) {
    kinglet::Session session = model.session();
    for (int again = 0; again < 5; again++) {
        kinglet::Generation answer = session.generate(values.at("schema_request"));
        std::string text;
        for (const kinglet::Piece &piece : answer) text += piece.text;
        require(text.front() == '{' && text.back() == '}' && text.find("\"age\"") != std::string::npos, text.c_str());
        require(answer.event().end_reason == KINGLET_END_OF_TEXT, "the end of the schema is the end");
        require(answer.message_json().find("{\"role\":\"assistant\",\"content\":\"{") == 0, "the message");
    }
    fails("unknown_key_code", [&] { session.generate(values.at("wrong_schema_request")); }, values.at("wrong_schema"));
}

void errors(const kinglet::Model &model) {
    kinglet::Session session = model.session();
    fails("missing_model_code", [] { kinglet::Model("/no/such/model"); });
    kinglet_model_options options = kinglet::model_options();
    options.backend = "cpu";
    options.gpu_layers = 1;
    options.gpu_import = 1;
    const kinglet::Model on_cpu(path, options);
    fails("wrong_options_code", [&] { on_cpu.session(); }, values.at("layers_on_cpu"));
    options.tuning_folder = "";
    fails("wrong_options_code", [&] { kinglet::Model(path, options); }, values.at("empty_folder"));
    fails("unknown_key_code", [&] { session.generate(values.at("unknown_key_request")); }, values.at("unknown_key"));
    fails("context_full_code", [&] { session.feed(std::vector<int32_t>(100000, 1)); });
    kinglet::Generation answer = session.generate(values.at("greedy_request"));
    fails("busy_code", [&] { session.reset(); });
    answer.read();
    session.reset();
}

void cancels(const kinglet::Model &model) {
    kinglet::Session session = model.session();
    kinglet::Generation answer = session.generate(values.at("endless_request"));
    kinglet::Piece piece;
    require(answer.next(piece), "a first piece");
    std::thread([&] { answer.cancel(); }).join();
    answer.read();
    require(answer.event().end_reason == KINGLET_END_CANCELLED, "the end of a cancelled answer");
}

void windows(kinglet::Model &model) {
    kinglet::Session session = model.session(), other = model.session();
    const std::vector<int32_t> prompt = numbers<int32_t>("text_tokens"), last(1, prompt.back());
    std::vector<float> direction = session.embed(prompt);
    double length = 0;
    for (float x : direction) length += double(x) * x;
    require(std::fabs(length - 1) < 1e-4 && session.size() == 0, "a direction, and the window as it was");
    session.feed(prompt);
    session.save(folder + ".window");
    other.load(folder + ".window");
    fails("damaged_window_code", [&] { other.load(path); });
    session.feed(last);
    other.feed(last);
    require(session.logits() == other.logits(), "a window from a file goes on");

    kinglet::Generation answer = other.generate(values.at("greedy_request"));
    model.suspend();
    kinglet::Piece piece;
    fails("suspended_code", [&] { answer.next(piece); });
    model.resume();
    require(tokens_of(answer) == numbers<int32_t>("greedy_tokens"), "an answer goes on after the model was suspended");
    require(model.trim() > 0, "sessions have memory to give back");
    require(answer_of(other, "greedy_request") == numbers<int32_t>("greedy_tokens"), "and take it anew");
}

void any_order() {
    int order[3] = {0, 1, 2};
    do {
        auto model = std::make_unique<kinglet::Model>(open_model());
        auto session = std::make_unique<kinglet::Session>(model->session());
        auto answer = std::make_unique<kinglet::Generation>(session->generate(values.at("greedy_request")));
        for (int which : order) {
            if (which == 0) model.reset();
            if (which == 1) session.reset();
            if (which == 2) {
                require(tokens_of(*answer) == numbers<int32_t>("greedy_tokens"), "an answer without its parents");
                answer.reset();
            }
        }
    } while (std::next_permutation(order, order + 3));
}

void training(const kinglet::Model &model) {
    std::string config = values.at("training_config");
    config.insert(1, "\"data\": \"" + lessons + "\", \"output\": \"" + folder + "\", ");
    kinglet::Trainer trainer = model.trainer(config);
    kinglet::Report report;
    trainer.cancel();
    fails("cancelled_code", [&] { trainer.step(report); });
    uint64_t step = 0;
    std::vector<double> losses = numbers<double>("training_losses");
    while (trainer.step(report)) {
        require(report.step == ++step && report.steps == losses.size(), "the number of the step");
        require(std::fabs(report.loss - losses[step - 1]) < 0.02, "the loss of the step");
    }
    require(step == losses.size() && trainer.finish().find("adapter.gguf") != std::string::npos, "the training's end");
    kinglet::Adapter adapter = trainer.adapter(), file = model.adapter(folder + "/adapter.gguf");
    kinglet::Session session = model.session();
    // An adapter and its opposite are the model as it is.
    session.set_adapters({&adapter, &file}, {1.0f, -1.0f});
    require(answer_of(session, "greedy_request") == numbers<int32_t>("greedy_tokens"), "an adapter and its opposite");
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    std::ifstream file(argv[1]);
    for (std::string line; std::getline(file, line);) {
        std::size_t tab = line.find('\t');
        if (tab != std::string::npos) values[line.substr(0, tab)] = line.substr(tab + 1);
    }
    path = argv[2], lessons = argv[3], folder = argv[4];
    require(!kinglet::version().empty(), "a version");
    require(kinglet::devices_json().find("\"cpu\"") != std::string::npos, "a CPU");
    kinglet::Model model = open_model();
    require(model.info_json().find("\"llama\"") != std::string::npos, "the family");
    require(model.chat_template().find("im_start") != std::string::npos, "the template");
    require(kinglet::Model::estimate(path).total >= model.session().memory().total, "an estimate");
    tokens(model);
    answers(model);
    split_utf8(model);
    structured(model);
    errors(model);
    cancels(model);
    windows(model);
    training(model);
    any_order();
    std::puts("conforms");
}
