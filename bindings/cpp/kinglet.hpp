/* kinglet.hpp - Kinglet for C++17: objects that free themselves, exceptions, ranges. Header only, over kinglet.h.
 *
 *     kinglet::Model model("model.gguf");
 *     kinglet::Session session = model.session();
 *     for (const kinglet::Piece &piece : session.generate(R"({"prompt": "Once upon a time", "max_tokens": 50})"))
 *         std::cout << piece.text << std::flush;
 *
 * Objects can be moved and not copied, and may be destroyed in any order. What takes JSON takes what kinglet.h describes at
 * the function of the same name. Everything but cancel() throws kinglet::Error.
 */
#ifndef KINGLET_HPP
#define KINGLET_HPP

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kinglet.h"

namespace kinglet {

/* What went wrong; code() is a KINGLET_ERR_* number. */
class Error : public std::runtime_error {
public:
    Error(int32_t code, const char *message) : std::runtime_error(message), code_(code) {}
    int32_t code() const noexcept { return code_; }
    bool busy() const noexcept { return code_ == KINGLET_ERR_BUSY; }
    bool cancelled() const noexcept { return code_ == KINGLET_ERR_CANCELLED; }

private:
    int32_t code_;
};

namespace detail {

/* Calls function with a place for its error behind the arguments. */
template <typename Function, typename... Arguments>
kinglet_status call(Function function, Arguments... arguments) {
    kinglet_error error;
    kinglet_status status = function(arguments..., &error);
    if (status < 0) throw Error(status, error.message);
    return status;
}

/* The object that function hands out. */
template <typename Object, typename Function, typename... Arguments>
Object *make(Function function, Arguments... arguments) {
    Object *object = nullptr;
    call(function, arguments..., &object);
    return object;
}

/* The string that function hands out; empty for none. */
template <typename Function, typename... Arguments>
std::string text(Function function, Arguments... arguments) {
    std::unique_ptr<char, void (*)(char *)> string(make<char>(function, arguments...), kinglet_string_free);
    return string ? std::string(string.get()) : std::string();
}

/* The array that function fills when asked a second time. */
template <typename Element, typename Function, typename... Arguments>
std::vector<Element> array(Function function, Arguments... arguments) {
    std::size_t count = 0;
    kinglet_error error;
    kinglet_status status = function(arguments..., nullptr, 0, &count, &error);
    if (status < 0 && status != KINGLET_ERR_TOO_SMALL) throw Error(status, error.message);
    std::vector<Element> elements(count);
    call(function, arguments..., elements.data(), elements.size(), &count);
    return elements;
}

/* A struct of the library's with its size set. */
template <typename Struct>
Struct sized() {
    Struct value{};
    value.struct_size = sizeof value;
    return value;
}

template <typename Object, void (*Free)(Object *)>
struct Deleter {
    void operator()(Object *object) const noexcept { Free(object); }
};
template <typename Object, void (*Free)(Object *)>
using Handle = std::unique_ptr<Object, Deleter<Object, Free>>;

}  // namespace detail

using Memory = kinglet_memory;
using Report = kinglet_train_report;

/* Options with the size set and everything else at its default; set what you want. */
inline kinglet_model_options model_options() { return detail::sized<kinglet_model_options>(); }
inline kinglet_session_options session_options() { return detail::sized<kinglet_session_options>(); }

inline std::string version() { return kinglet_version(); }
inline std::string build_json() { return detail::text(kinglet_build_json); }
inline std::string devices_json() { return detail::text(kinglet_devices_json); }

/* A LoRA adapter. */
class Adapter {
public:
    explicit Adapter(kinglet_adapter *adapter) : handle_(adapter) {}
    std::string info_json() const { return detail::text(kinglet_adapter_info_json, get()); }
    const kinglet_adapter *get() const noexcept { return handle_.get(); }

private:
    detail::Handle<kinglet_adapter, kinglet_adapter_free> handle_;
};

/* A piece of an answer: whole characters, and the tokens behind them. Both are valid until the next piece. */
struct Piece {
    std::string_view text;
    const int32_t *tokens;
    std::size_t n_tokens;
};

/* An answer under way: a range of pieces that can be walked once. */
class Generation {
public:
    explicit Generation(kinglet_generation *generation) : handle_(generation) {}

    /* Takes the next piece; false at the end. */
    bool next(Piece &piece) {
        while (detail::call(kinglet_generation_next, get(), &event_) == KINGLET_OK) {
            if (event_.kind == KINGLET_EVENT_TEXT) {
                piece = Piece{std::string_view(event_.text, event_.text_len), event_.tokens, event_.n_tokens};
                return true;
            }
        }
        return false;
    }

    /* The rest of the answer. */
    std::string read() {
        std::string whole;
        for (const Piece &piece : *this) whole += piece.text;
        return whole;
    }

    /* The last event: counts and times so far, and at the end the reason. */
    const kinglet_event &event() const noexcept { return event_; }

    /* Ends the answer; from any thread. */
    void cancel() const noexcept { kinglet_generation_cancel(get()); }

    class iterator {
    public:
        using iterator_category = std::input_iterator_tag;
        using value_type = Piece;
        using difference_type = std::ptrdiff_t;
        using pointer = const Piece *;
        using reference = const Piece &;

        iterator() = default;
        explicit iterator(Generation *generation) : generation_(generation) { ++*this; }
        reference operator*() const { return piece_; }
        pointer operator->() const { return &piece_; }
        iterator &operator++() {
            if (!generation_->next(piece_)) generation_ = nullptr;
            return *this;
        }
        void operator++(int) { ++*this; }
        bool operator==(const iterator &other) const { return generation_ == other.generation_; }
        bool operator!=(const iterator &other) const { return !(*this == other); }

    private:
        Generation *generation_ = nullptr;
        Piece piece_{};
    };
    iterator begin() { return iterator(this); }
    iterator end() { return iterator(); }

    /* The answer so far as a message in JSON, with calls of tools told from text. */
    std::string message_json() const { return detail::text(kinglet_generation_message_json, get()); }

    kinglet_generation *get() const noexcept { return handle_.get(); }

private:
    detail::Handle<kinglet_generation, kinglet_generation_free> handle_;
    kinglet_event event_ = detail::sized<kinglet_event>();
};

/* One conversation. */
class Session {
public:
    explicit Session(kinglet_session *session) : handle_(session) {}

    Generation generate(const std::string &request_json) {
        return Generation(detail::make<kinglet_generation>(kinglet_generate, get(), request_json.c_str()));
    }
    void feed(const std::vector<int32_t> &tokens) {
        detail::call(kinglet_session_feed, get(), tokens.data(), tokens.size());
    }
    std::vector<float> logits() const { return detail::array<float>(kinglet_session_logits, get()); }
    std::vector<float> score(const std::vector<int32_t> &tokens) {
        std::vector<float> logprobs(tokens.empty() ? 0 : tokens.size() - 1);
        detail::call(kinglet_session_score, get(), tokens.data(), tokens.size(), logprobs.data(), logprobs.size());
        return logprobs;
    }
    /* What tokens mean together, as a direction of length 1. */
    std::vector<float> embed(const std::vector<int32_t> &tokens) {
        return detail::array<float>(kinglet_session_embed, get(), tokens.data(), tokens.size());
    }
    /* Writes the window to a file, and takes it from there. */
    void save(const std::string &path) { detail::call(kinglet_session_save, get(), path.c_str()); }
    void load(const std::string &path) { detail::call(kinglet_session_load, get(), path.c_str()); }
    Session fork() { return Session(detail::make<kinglet_session>(kinglet_session_fork, get())); }
    void reset() { detail::call(kinglet_session_reset, get()); }
    void rewind(std::size_t n_tokens) { detail::call(kinglet_session_rewind, get(), n_tokens); }
    std::size_t size() const {
        std::size_t count = 0;
        detail::call(kinglet_session_token_count, get(), &count);
        return count;
    }
    void set_adapters(const std::vector<const Adapter *> &adapters, const std::vector<float> &scales = {}) {
        if (!scales.empty() && scales.size() != adapters.size())
            throw Error(KINGLET_ERR_ARG, "there must be a scale for every adapter, or none");
        std::vector<const kinglet_adapter *> handles;
        for (const Adapter *adapter : adapters) handles.push_back(adapter->get());
        detail::call(kinglet_session_set_adapters, get(), handles.data(), scales.empty() ? nullptr : scales.data(),
                     handles.size());
    }
    Memory memory() const {
        Memory memory = detail::sized<Memory>();
        detail::call(kinglet_session_memory, get(), &memory);
        return memory;
    }
    /* Stops feed, score or embed; from any thread. */
    void cancel() const noexcept { kinglet_session_cancel(get()); }

    kinglet_session *get() const noexcept { return handle_.get(); }

private:
    detail::Handle<kinglet_session, kinglet_session_free> handle_;
};

/* A training run. */
class Trainer {
public:
    explicit Trainer(kinglet_trainer *trainer) : handle_(trainer) {}

    /* Takes a step; false when only finish is left. */
    bool step(Report &report) {
        report = detail::sized<Report>();
        return detail::call(kinglet_trainer_step, get(), &report) == KINGLET_OK;
    }
    std::string info_json() const { return detail::text(kinglet_trainer_info_json, get()); }
    void save() { detail::call(kinglet_trainer_save, get()); }
    Adapter adapter() { return Adapter(detail::make<kinglet_adapter>(kinglet_trainer_adapter, get())); }
    std::string finish() { return detail::text(kinglet_trainer_finish, get()); }
    /* Stops the step that is running, or else the next; from any thread. */
    void cancel() const noexcept { kinglet_trainer_cancel(get()); }

    kinglet_trainer *get() const noexcept { return handle_.get(); }

private:
    detail::Handle<kinglet_trainer, kinglet_trainer_free> handle_;
};

/* Weights with tokenizer and chat template. */
class Model {
public:
    explicit Model(const std::string &path, const kinglet_model_options &options = model_options())
        : Model(detail::make<kinglet_model>(kinglet_model_open, path.c_str(), &options)) {}
    explicit Model(kinglet_model *model) : handle_(model) {}

    /* The model in memory of yours, which must outlive all that uses it. */
    static Model from_memory(const void *bytes, std::size_t length,
                             const kinglet_model_options &options = model_options()) {
        kinglet_release_callback nothing = nullptr;
        void *user = nullptr;
        return Model(detail::make<kinglet_model>(kinglet_model_open_memory, bytes, length, nothing, user, &options));
    }

    static Memory estimate(const std::string &path, const kinglet_session_options &session = session_options(),
                           const kinglet_model_options &options = model_options()) {
        Memory memory = detail::sized<Memory>();
        detail::call(kinglet_model_estimate, path.c_str(), &options, &session, &memory);
        return memory;
    }

    /* Gives back memory that can be had again; its bytes. */
    uint64_t trim() {
        uint64_t freed = 0;
        detail::call(kinglet_model_trim, get(), &freed);
        return freed;
    }
    /* Lets nothing compute with the model, from the return of suspend to resume; from any thread. */
    void suspend() { detail::call(kinglet_model_suspend, get()); }
    void resume() { detail::call(kinglet_model_resume, get()); }

    std::string info_json() const { return detail::text(kinglet_model_info_json, get()); }
    std::string chat_template() const { return detail::text(kinglet_model_chat_template, get()); }
    std::vector<int32_t> tokenize(std::string_view text, uint32_t flags = 0) const {
        return detail::array<int32_t>(kinglet_tokenize, get(), text.data(), text.size(), flags);
    }
    std::string detokenize(const std::vector<int32_t> &tokens, uint32_t flags = 0) const {
        std::vector<char> text = detail::array<char>(kinglet_detokenize, get(), tokens.data(), tokens.size(), flags);
        return std::string(text.begin(), text.end());
    }
    Session session(const kinglet_session_options &options = session_options()) const {
        return Session(detail::make<kinglet_session>(kinglet_session_create, get(), &options));
    }
    Adapter adapter(const std::string &path) const {
        return Adapter(detail::make<kinglet_adapter>(kinglet_adapter_open, get(), path.c_str()));
    }
    Trainer trainer(const std::string &config_json) const {
        return Trainer(detail::make<kinglet_trainer>(kinglet_trainer_create, get(), config_json.c_str()));
    }

    kinglet_model *get() const noexcept { return handle_.get(); }

private:
    detail::Handle<kinglet_model, kinglet_model_free> handle_;
};

}  // namespace kinglet

#endif
