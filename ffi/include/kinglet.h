/* kinglet.h - the C interface of Kinglet: language models on your own device, chatting and learning.
 *
 * C99 and C++11. ABI version 1.
 *
 * THE RULES
 *
 * 1. Ownership. What a function hands out through a pointer to a pointer is yours: free it with the function of its
 *    kind (kinglet_model_free, kinglet_string_free and so on); NULL may be freed. What stands inside events and
 *    reports is the library's, and valid until the next call on the same object.
 * 2. Any order. Objects keep alive what they need: a model may be freed before its sessions, a session before its
 *    generation, an adapter while a session applies it.
 * 3. Threads. Any thread may call anything. Models and adapters are shared freely. A session, a generation, a trainer
 *    take one call at a time: a second one returns KINGLET_ERR_BUSY and does nothing. While a generation is under
 *    way, its session is busy too. The functions named _cancel may be called at any time. Freeing an object takes it
 *    from everybody: no other call on it, _cancel included, may be running or follow. Callbacks run on the thread
 *    that is in the call; those of kinglet_set_log and of kinglet_model_open_memory may run on any. A callback may
 *    not unwind (no C++ exception, no longjmp).
 * 4. Work happens in calls. When a call has returned, nothing goes on behind it; the threads it used are parked.
 *    One thing is the process's from then on: where a processor has AMX, the first session or trainer asks Linux for
 *    its use, and a signal stack that is set up later has to have the size that getauxval(AT_MINSIGSTKSZ) tells.
 * 5. Errors. A function returns a kinglet_status: 0 or above is success, below 0 an error that says what to do about
 *    it. The last argument, which may be NULL, is your own kinglet_error, whose message is for people. After an error
 *    an object is as it was before the call, unless the function says otherwise. After KINGLET_ERR_INTERNAL it can
 *    only be freed. The library does not abort, exit, print, or read environment variables.
 * 6. Structs. Fill them with zeros, set struct_size to sizeof the struct, then what you want: zero is the default of
 *    every field. Later versions append fields; a library that does not know a field you set says KINGLET_ERR_ABI.
 *    Options may be NULL.
 * 7. Text is UTF-8. Strings are NUL-terminated, unless a length stands beside them. JSON is used where data are
 *    nested; an unknown key in it is an error that names the key.
 * 8. Arrays that you provide come with their capacity, and get their count through a pointer that may be NULL. Where
 *    they are too short you get KINGLET_ERR_TOO_SMALL and the count: call with capacity 0 first to ask for it.
 * 9. What is in this header stays: versions only add to it. The shared library is libkinglet.so.1 as long as that
 *    holds.
 *
 * A chat, without the handling of errors:
 *
 *     kinglet_model *model;
 *     kinglet_session *session;
 *     kinglet_generation *answer;
 *     kinglet_event event = {.struct_size = sizeof event};
 *     kinglet_model_open("model.gguf", NULL, &model, NULL);
 *     kinglet_session_create(model, NULL, &session, NULL);
 *     kinglet_generate(session, "{\"messages\": [{\"role\": \"user\", \"content\": \"Hello!\"}]}", &answer, NULL);
 *     while (kinglet_generation_next(answer, &event, NULL) == KINGLET_OK)
 *         if (event.kind == KINGLET_EVENT_TEXT) fwrite(event.text, 1, event.text_len, stdout);
 *     kinglet_generation_free(answer);
 *     kinglet_session_free(session);
 *     kinglet_model_free(model);
 */
#ifndef KINGLET_H
#define KINGLET_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the ABI that this header describes. */
#define KINGLET_ABI_VERSION 1

/* ---------------------------------------------------------------------------------------------------------- Errors -- */

typedef int32_t kinglet_status;

enum {
    KINGLET_OK = 0,
    KINGLET_DONE = 1,               /* nothing more will come */
    KINGLET_ERR_ARG = -1,           /* an argument is wrong: a mistake in the calling program */
    KINGLET_ERR_IO = -2,            /* the operating system refused a file operation */
    KINGLET_ERR_FORMAT = -3,        /* a file is damaged or of another kind */
    KINGLET_ERR_UNSUPPORTED = -4,   /* valid, but this build or version cannot do it */
    KINGLET_ERR_MEMORY = -5,        /* the memory budget, or the system's memory, does not hold it: ask for less */
    KINGLET_ERR_CONTEXT_FULL = -6,  /* the session's window does not hold so many tokens */
    KINGLET_ERR_BUSY = -7,          /* another call, or a generation, is using the object */
    KINGLET_ERR_CANCELLED = -8,     /* a _cancel function was called */
    KINGLET_ERR_DEVICE_LOST = -9,   /* the GPU or its driver failed: open the model anew, on the CPU perhaps */
    KINGLET_ERR_SUSPENDED = -10,    /* kinglet_model_suspend was called: call again after kinglet_model_resume */
    KINGLET_ERR_TOO_SMALL = -11,    /* your array is too short; its count was written */
    KINGLET_ERR_ABI = -12,          /* a struct has no struct_size, or sets a field that this library does not know */
    KINGLET_ERR_NUMERIC = -13,      /* a computation gave NaN or infinity: the model's weights are damaged, say */
    KINGLET_ERR_INTERNAL = -99      /* a fault in the library; the object can only be freed */
};

/* What went wrong. 512 bytes for ever. */
typedef struct kinglet_error {
    int32_t code;       /* the status that was returned; 0 after success */
    char message[508];  /* for people; cut at a whole character */
} kinglet_error;

/* --------------------------------------------------------------------------------------------------------- Objects -- */

/* Weights with tokenizer and chat template, and where its sessions run. */
typedef struct kinglet_model kinglet_model;
/* One conversation: a window of tokens that were read. */
typedef struct kinglet_session kinglet_session;
/* An answer under way. */
typedef struct kinglet_generation kinglet_generation;
/* A LoRA adapter: small trained corrections to a model. */
typedef struct kinglet_adapter kinglet_adapter;
/* A training run. */
typedef struct kinglet_trainer kinglet_trainer;

/* --------------------------------------------------------------------------------------------------------- Library -- */

/* KINGLET_ABI_VERSION of the library that is loaded. It speaks every version up to this one. */
uint32_t kinglet_abi_version(void);

/* The version of the library, such as "0.1.0". Do not free it. */
const char *kinglet_version(void);

/* How the library was built and what it uses of this processor, as a JSON object: version, abi, target, isa, gpu,
   grammar (whether answers can be held to schemas and grammars), checked, families (architectures that can run). */
kinglet_status kinglet_build_json(char **out, kinglet_error *err);

/* The devices that models can run on, as a JSON array of objects: backend (what kinglet_model_options takes), name,
   kind, api, driver, binding_bytes, unfit (why it cannot be used, or null). */
kinglet_status kinglet_devices_json(char **out, kinglet_error *err);

/* Gets one message, valid during the call. */
typedef void (*kinglet_log_callback)(void *user, int32_t level, const char *message);

/* Sends messages up to level (1 errors, 2 warnings, 3 information, 4 details, 5 all) to callback, from any thread.
   NULL, as in the beginning, for silence. When this has returned, the callback before is not called any more. The
   callback must not call this function. */
kinglet_status kinglet_set_log(kinglet_log_callback callback, void *user, int32_t level, kinglet_error *err);

/* Frees a string that the library gave. */
void kinglet_string_free(char *string);

/* ---------------------------------------------------------------------------------------------------------- Models -- */

enum {
    KINGLET_MODEL_VALIDATE = 1,  /* read all weights on opening, and refuse NaN and infinity */
    KINGLET_MODEL_COPY = 2       /* read the file into private memory instead of mapping it: for files that others change */
};

enum {
    KINGLET_TUNE_SOFTWARE = 1,  /* time the kernels of software drivers too, which are there for tests */
    KINGLET_TUNE_INT8 = 2       /* let products of eight bits compete too: quicker for some, but rounded more */
};

typedef struct kinglet_model_options {
    uint32_t struct_size;
    uint32_t flags;          /* KINGLET_MODEL_* */
    const char *backend;     /* "auto" or NULL: the best GPU, else the CPU; "cpu"; "gpu"; "gpu:1" */
    int32_t threads;         /* of each session and trainer; 0: one per core */
    int32_t reserved;        /* 0 */
    uint64_t memory_budget;  /* most bytes that the file and one session, or trainer, take together; 0: no limit */
    uint64_t prefix_cache;   /* most bytes, beside the budget, for prompts that were read, so that sessions that begin alike
                                share the work; 0: none */
    /* The following are about GPUs. Where the CPU runs the model, and in a library built without GPUs, gpu_memory, gpu_import and
       tuning do nothing, and gpu_layers is an error. */
    int32_t gpu_layers;      /* of each session: how many of the last layers the GPU runs, with the head, while the CPU runs
                                those before; from the model's number of layers on, all. 0: all, or as many as the GPU's memory
                                holds where "auto" chose it or gpu_memory bounds it. Trainers do not divide a model */
    uint32_t tuning;         /* KINGLET_TUNE_*; 0 without a folder */
    uint64_t gpu_memory;     /* most bytes of the GPU's memory that a session takes: it gets as many layers as that holds;
                                0: no limit */
    const char *tuning_folder; /* kernels are timed before a device's first run, a few seconds for each type of weights, those
                                are taken that are clearly quicker than the usual ones, and the times kept here, in a file for
                                each device and driver, with what the driver has compiled, which it trusts: a folder of your
                                own. One that cannot be written is a warning in the log. NULL: nothing is timed or written */
    int32_t gpu_import;      /* 1: sessions and trainers read the weights on a GPU from the pages of the mapped file, without a
                                copy, where its driver allows that (Vulkan on Linux and Android); where not, they are copied,
                                with a warning in the log. For GPUs that share the processor's memory: a card would fetch the
                                weights anew for every token. 0: they are copied */
    int32_t reserved_2;      /* 0 */
} kinglet_model_options;

/* Bytes that a model with one session takes: of main memory, or of the GPU's where it runs there; of a model that is divided,
   both together. */
typedef struct kinglet_memory {
    uint32_t struct_size;
    uint32_t reserved;
    uint64_t weights;      /* the mapped file: shared by all processes, and taken back by the system when it must; on a GPU
                              what it reads of it, mapped or a copy, once for all sessions of a model */
    uint64_t kv_cache;     /* keys and values; these grow as the window fills */
    uint64_t activations;  /* activations, logits, tables */
    uint64_t scratch;      /* of all threads */
    uint64_t adapters;     /* adapters in force */
    uint64_t total;        /* all of these */
    uint64_t mapped;       /* of the weights what is read in place from the mapped file; the rest of the total is allocated */
} kinglet_memory;

typedef struct kinglet_session_options kinglet_session_options;

/* Opens the GGUF file at path; of a model in several files, any one of them. The file is mapped: while the model is
   open, do not change or truncate it (to replace it, rename another file over it), or open it with
   KINGLET_MODEL_COPY. The system ends a process that reads what was cut off, on the CPU and by gpu_import. */
kinglet_status kinglet_model_open(const char *path, const kinglet_model_options *options, kinglet_model **out,
                                  kinglet_error *err);

/* Opens the model that takes length bytes (0: all) from offset of an open file, such as an asset in a package. The
   descriptor stays yours and may be closed. The offset must be a multiple of the page size, or the model copied. */
kinglet_status kinglet_model_open_fd(int32_t fd, uint64_t offset, uint64_t length, const kinglet_model_options *options,
                                     kinglet_model **out, kinglet_error *err);

/* Called once with the pointer that came with it. */
typedef void (*kinglet_release_callback)(void *user);

/* Opens the model in your memory, which is used in place and must be aligned to 8 bytes, or the model copied. It must
   not change until release (which may be NULL) is called, when the last object that uses it is freed. Where opening
   fails, release is not called. */
kinglet_status kinglet_model_open_memory(const void *bytes, size_t length, kinglet_release_callback release, void *user,
                                         const kinglet_model_options *options, kinglet_model **out,
                                         kinglet_error *err);

/* Makes one more kinglet_model_free due. */
kinglet_status kinglet_model_retain(kinglet_model *model, kinglet_error *err);

void kinglet_model_free(kinglet_model *model);

/* What the model is, as a JSON object: file, name, family, licence, file_bytes, parameters, context, vocabulary,
   layers, width, chat_template (whether it has one), bos, eos, ends (the tokens that end an answer). */
kinglet_status kinglet_model_info_json(const kinglet_model *model, char **out, kinglet_error *err);

/* The chat template, a Jinja program. A base model has none: NULL is written. */
kinglet_status kinglet_model_chat_template(const kinglet_model *model, char **out, kinglet_error *err);

/* What opening the model at path and one session with a full window would take, on the backend that model_options name.
   Nothing is allocated; only the header of the file is read. */
kinglet_status kinglet_model_estimate(const char *path, const kinglet_model_options *model_options,
                                      const kinglet_session_options *session, kinglet_memory *out, kinglet_error *err);

/* For when memory gets short: gives back what can be had again, which is the prefix cache and what sessions without a running
   call compute in; the next call takes it anew. freed, which may be NULL, gets the bytes. */
kinglet_status kinglet_model_trim(kinglet_model *model, uint64_t *freed, kinglet_error *err);

/* For when the application goes to the background, where the system allows no work on the GPU: stops what computes with the
   model, and returns when nothing does any more, after a token or a part of a prompt at most. Until kinglet_model_resume every
   call that would compute returns KINGLET_ERR_SUSPENDED and has not happened: sessions, answers and trainers go on after that
   as if nothing had been. Sessions and trainers on a GPU give its memory back; keys, values and what is trained wait in main
   memory, and the first call after that brings them and the weights up again; all other memory stays as it is. Not from a
   callback. */
kinglet_status kinglet_model_suspend(kinglet_model *model, kinglet_error *err);

kinglet_status kinglet_model_resume(kinglet_model *model, kinglet_error *err);

/* ---------------------------------------------------------------------------------------------------------- Tokens -- */

enum {
    KINGLET_TOKENIZE_SPECIAL = 1,   /* add the tokens around the text that the model asks for (BOS, EOS) */
    KINGLET_TOKENIZE_CONTROL = 2,   /* let "<|im_end|>" and such stand for control tokens: not for text from people */
    KINGLET_DETOKENIZE_CONTROL = 1  /* write the text of control tokens, which otherwise have none */
};

/* The tokens of length bytes of text. */
kinglet_status kinglet_tokenize(const kinglet_model *model, const char *text, size_t length, uint32_t flags, int32_t *out,
                                size_t capacity, size_t *count, kinglet_error *err);

/* The text of tokens, without a NUL: whole UTF-8, with U+FFFD where bytes are none. */
kinglet_status kinglet_detokenize(const kinglet_model *model, const int32_t *tokens, size_t n_tokens, uint32_t flags,
                                  char *out, size_t capacity, size_t *length, kinglet_error *err);

/* The bytes of one token, which may be a part of a character. */
kinglet_status kinglet_token_bytes(const kinglet_model *model, int32_t token, uint32_t flags, void *out, size_t capacity,
                                   size_t *length, kinglet_error *err);

/* -------------------------------------------------------------------------------------------------------- Sessions -- */

enum {
    KINGLET_KV_F16 = 1,  /* the default */
    KINGLET_KV_F32 = 2,
    KINGLET_KV_Q8_0 = 3  /* half the memory of the default */
};

struct kinglet_session_options {
    uint32_t struct_size;
    uint32_t flags;          /* 0 */
    int32_t context_tokens;  /* what the window holds; 0: as many as the model was trained for */
    int32_t kv_type;         /* KINGLET_KV_*; how keys and values are kept */
    int32_t chunk_tokens;    /* most tokens of a prompt that are computed at once; 0: 512 */
    int32_t reserved;        /* 0 */
};

kinglet_status kinglet_session_create(const kinglet_model *model, const kinglet_session_options *options,
                                      kinglet_session **out, kinglet_error *err);

/* A generation that is under way goes on. */
void kinglet_session_free(kinglet_session *session);

/* A second session that has read the same tokens under the same adapters. Memory for them is shared until one of the
   two writes. On the CPU. */
kinglet_status kinglet_session_fork(kinglet_session *session, kinglet_session **out, kinglet_error *err);

/* Forgets all tokens. */
kinglet_status kinglet_session_reset(kinglet_session *session, kinglet_error *err);

/* Keeps the first n_tokens tokens and forgets the others. */
kinglet_status kinglet_session_rewind(kinglet_session *session, size_t n_tokens, kinglet_error *err);

/* How many tokens the window holds. */
kinglet_status kinglet_session_token_count(kinglet_session *session, size_t *count, kinglet_error *err);

/* What the session takes now. */
kinglet_status kinglet_session_memory(kinglet_session *session, kinglet_memory *out, kinglet_error *err);

/* Puts adapters in force, each times its scale (NULL: all 1), in place of those before; none for the model as it is.
   Another set than before empties the window. On the CPU. */
kinglet_status kinglet_session_set_adapters(kinglet_session *session, const kinglet_adapter *const *adapters,
                                            const float *scales, size_t n_adapters, kinglet_error *err);

/* Reads tokens. After KINGLET_ERR_CANCELLED whole chunks that were read stay. */
kinglet_status kinglet_session_feed(kinglet_session *session, const int32_t *tokens, size_t n_tokens, kinglet_error *err);

/* The logits of what follows the tokens fed last, one for each token of the vocabulary. */
kinglet_status kinglet_session_logits(kinglet_session *session, float *out, size_t capacity, size_t *count,
                                      kinglet_error *err);

/* Reads tokens and gives the natural logarithm of the probability of each but the first, given all before it:
   n_tokens - 1 numbers. After KINGLET_ERR_CANCELLED whole chunks that were read stay. */
kinglet_status kinglet_session_score(kinglet_session *session, const int32_t *tokens, size_t n_tokens, float *logprobs,
                                     size_t capacity, kinglet_error *err);

/* What tokens mean together, as a direction: the mean of the states behind the last layer, scaled to length 1; two texts are
   as alike as the sum of the products of their numbers is near 1. There are as many numbers as the model is wide. The window
   is left as it is. */
kinglet_status kinglet_session_embed(kinglet_session *session, const int32_t *tokens, size_t n_tokens, float *out,
                                     size_t capacity, size_t *count, kinglet_error *err);

/* Writes the window, tokens with their keys and values, to the file at path, whole or not at all. On the CPU. */
kinglet_status kinglet_session_save(kinglet_session *session, const char *path, kinglet_error *err);

/* Takes the window from a file of kinglet_session_save, in place of this one: nothing of it is computed again. Model, kv_type
   and adapters must be those of the session that was saved. On the CPU. */
kinglet_status kinglet_session_load(kinglet_session *session, const char *path, kinglet_error *err);

/* Stops kinglet_session_feed, kinglet_session_score or kinglet_session_embed, if one is running, between two operations. Any thread, signal
   handlers too. */
void kinglet_session_cancel(const kinglet_session *session);

/* ------------------------------------------------------------------------------------------------------- Generation -- */

enum {
    KINGLET_EVENT_TEXT = 1,     /* a piece of the answer: text and tokens */
    KINGLET_EVENT_PREFILL = 2,  /* a chunk of a long prompt has been read: prefilled_tokens of prompt_tokens */
    KINGLET_EVENT_END = 3       /* the last event: end_reason, counts and times */
};

enum {
    KINGLET_END_OF_TEXT = 1,       /* the model ended its answer */
    KINGLET_END_LENGTH = 2,        /* max_tokens were generated */
    KINGLET_END_STOP = 3,          /* a stop text came up */
    KINGLET_END_CONTEXT_FULL = 4,  /* the window is full */
    KINGLET_END_CANCELLED = 5      /* kinglet_generation_cancel was called */
};

typedef struct kinglet_event {
    uint32_t struct_size;
    int32_t kind;              /* KINGLET_EVENT_* */
    const char *text;          /* whole characters, NUL-terminated; NULL where there is none */
    size_t text_len;           /* in bytes; 0 while a character or a possible stop text is incomplete */
    const int32_t *tokens;     /* the tokens behind the text */
    size_t n_tokens;
    int32_t end_reason;        /* KINGLET_END_* at the end */
    int32_t prompt_tokens;     /* tokens of the prompt */
    int32_t reused_tokens;     /* of these, read before and kept in the window */
    int32_t prefilled_tokens;  /* of these, read by now */
    int32_t output_tokens;     /* tokens generated so far */
    int32_t reserved;
    double prefill_ms;         /* time for the prompt and the first token so far */
    double decode_ms;          /* time for the further tokens so far */
} kinglet_event;

/* Begins an answer. The session belongs to it until its end was told, it fails, or it is freed. Nothing is computed
   yet. The request is a JSON object:

     messages     the whole conversation: [{"role": "user", "content": "Hello!"}, ...], as the OpenAI API has it; keys
                  are role, content, tool_calls, name, tool_call_id, reasoning_content. What the session has read of
                  it already is not computed again.
     prompt       instead of messages: text to continue, without the chat template; the text of control tokens in it
                  stands for them
     tools        tools on offer, as the OpenAI API has them, for the chat template; kinglet_generation_message_json tells
                  calls from text
     tool_choice  "auto": the model says whether it calls tools; "required": it calls one or more, with arguments that
                  fit their schemas; {"type": "function", "function": {"name": ...}}: it calls that one; "none": as
                  without tools
     response_format  {"type": "json_object"}: the answer is JSON; {"type": "json_schema", "json_schema": {"schema":
                  {...}}}: JSON that fits the schema. What of a schema cannot be held is an error that names it
     grammar      in place of response_format: a grammar, as text, which the answer is held to, in the dialect of Lark
                  that llguidance reads: start: "yes" | "no"
                  A library built without the feature grammar holds none of these: KINGLET_ERR_UNSUPPORTED
     template     further variables of the chat template, such as {"enable_thinking": false}
     max_tokens   most tokens to generate
     stop         a text or an array of texts that end the answer and are no part of it
     ignore_end   true: go on where the model would end
     special      true: give the text of control tokens too
     sampling     how tokens are chosen, an object: temperature (0.8; 0 takes the most probable), top_k (40), top_p
                  (0.95), min_p (0.05), typical_p (1), seed (random), repeat_penalty (1), frequency_penalty (0),
                  presence_penalty (0), penalty_last_n (64), dry_multiplier (0), dry_base (1.75), dry_allowed_length
                  (2), dry_last_n (all), dry_breakers (texts), mirostat ({"tau": 5, "eta": 0.1}, off), logit_bias
                  ([[token, number], ...]; -1e39 bans a token) */
kinglet_status kinglet_generate(kinglet_session *session, const char *request_json, kinglet_generation **out,
                                kinglet_error *err);

/* Computes until there is something to tell, usually one token or a chunk of the prompt, and fills event: KINGLET_OK.
   Behind the event KINGLET_EVENT_END: KINGLET_DONE. After an error, but for KINGLET_ERR_SUSPENDED, every further call returns
   it again. */
kinglet_status kinglet_generation_next(kinglet_generation *generation, kinglet_event *event, kinglet_error *err);

/* The answer so far, or the whole behind its end, as a JSON object: role, content and, where the request has tools and the
   model called some, tool_calls, as the OpenAI API has them: the arguments are a string of JSON. With the answers of the
   tools it goes among the messages of the next request. */
kinglet_status kinglet_generation_message_json(kinglet_generation *generation, char **out, kinglet_error *err);

/* Ends the answer between two operations, wherever it is, reading the prompt included: kinglet_generation_next gives
   KINGLET_EVENT_END. Any thread, signal handlers too. */
void kinglet_generation_cancel(const kinglet_generation *generation);

/* Ends the answer if it has not ended; the session is free again. */
void kinglet_generation_free(kinglet_generation *generation);

/* Gets an event; anything but 0 cancels. */
typedef int32_t (*kinglet_event_callback)(void *user, const kinglet_event *event);

/* Generates and calls callback with every event. */
kinglet_status kinglet_generate_with(kinglet_session *session, const char *request_json, kinglet_event_callback callback,
                                     void *user, kinglet_error *err);

/* -------------------------------------------------------------------------------------------------------- Adapters -- */

/* Opens the LoRA adapter at path, a GGUF file or a folder as PEFT writes it, and checks that it fits model. */
kinglet_status kinglet_adapter_open(const kinglet_model *model, const char *path, kinglet_adapter **out,
                                    kinglet_error *err);

void kinglet_adapter_free(kinglet_adapter *adapter);

/* What the adapter is, as a JSON object: name, rank, alpha, rslora, dora, parameters, matrices, architecture. */
kinglet_status kinglet_adapter_info_json(const kinglet_adapter *adapter, char **out, kinglet_error *err);

/* Writes to out_path a new model file with adapters inside, each times its scale (NULL: all 1). The matrices they
   change get the type quant, such as "Q8_0" or "F16"; NULL: the one they had. */
kinglet_status kinglet_adapter_merge(const kinglet_model *model, const kinglet_adapter *const *adapters,
                                     const float *scales, size_t n_adapters, const char *out_path, const char *quant,
                                     kinglet_error *err);

/* -------------------------------------------------------------------------------------------------------- Training -- */

enum {
    KINGLET_TRAIN_STEP = 1,        /* a step was taken */
    KINGLET_TRAIN_ROLLED_BACK = 2  /* a step went wrong: an earlier state is in place, with half the learning rate */
};

/* Numbers that were not measured are NaN. */
typedef struct kinglet_train_report {
    uint32_t struct_size;
    int32_t kind;              /* KINGLET_TRAIN_* */
    uint64_t step;             /* steps taken, this one included */
    uint64_t steps;            /* steps in all */
    double loss;               /* mean loss of the step's tokens, or pairs */
    double learning_rate;
    double gradient_norm;      /* before clipping */
    double tokens_per_second;
    double validation_loss;    /* where the step was followed by a validation */
    double reward_accuracy;    /* of losses on preferences: share of pairs that are judged right */
    double reward_margin;      /* of losses on preferences: mean margin */
    const char *note;          /* why the state was rolled back, or NULL */
} kinglet_train_report;

/* Reads the data and makes everything ready for the first step. The configuration is a JSON object:

     data         a file or an array of files to learn from: .jsonl, .json or plain text; a line of .jsonl is one of
                  {"messages": [...]}, {"instruction": ..., "input": ..., "output": ...}, {"prompt": ...,
                  "completion": ...}, {"text": ...}, {"prompt": ..., "chosen": ..., "rejected": ...}
     output       the folder for everything it writes; made where it is missing
     validation   files to validate on, in place of a share (val_fraction, 0.1) of the data
     keep         against forgetting: a number of texts that the model writes itself, or files, on which it is to stay as it
                  is: the divergence from the untrained model is part of the loss, keep_weight (1) times, on
                  keep_share (0.5) tokens of them for each of the data
     resume       true: go on from the last checkpoint in output, bit by bit as if nothing had happened
     title        the heading of output/report.html
     probe        a text whose perplexity before and after shows what was forgotten

   and how it learns, with defaults: rank (8), alpha (16), rslora, dora, dropout (0), targets (["q", "k", "v", "o",
   "gate", "up", "down"]; also "embedding", "head"), full (false; all weights instead of an adapter), batch (4), seq
   (256 tokens), accumulation (1), packing ("best_fit"), truncation ("end"), shuffle (true), steps (null: as many as
   epochs take), epochs (3), lr (2e-4), min_lr (0), schedule ("cosine"), warmup (10), weight_decay (0), betas, eps,
   clip (1), state_8bit (false), arithmetic of the model's own maps ("narrow", in 8-bit integers; "wide", in 16;
   "exact", in f32), loss ("cross_entropy", {"dpo": {"beta": 0.1}}, ...), seed (42), eval_every (50), checkpoint_every
   (50), keep_checkpoints (2), early_stop (null). */
kinglet_status kinglet_trainer_create(const kinglet_model *model, const char *config_json, kinglet_trainer **out,
                                      kinglet_error *err);

/* What was not saved is lost. */
void kinglet_trainer_free(kinglet_trainer *trainer);

/* What is ahead, as a JSON object: parameters, steps, step, data, validation, memory, weights, mapped (of the weights
   what is read in place from the file), tokens, config, notes. */
kinglet_status kinglet_trainer_info_json(kinglet_trainer *trainer, char **out, kinglet_error *err);

/* Takes one step and fills report: KINGLET_OK. When all steps were taken: KINGLET_DONE. A step that fails or is
   cancelled has not happened; the next call takes it. */
kinglet_status kinglet_trainer_step(kinglet_trainer *trainer, kinglet_train_report *report, kinglet_error *err);

/* Writes a checkpoint into the output folder, whole or not at all. */
kinglet_status kinglet_trainer_save(kinglet_trainer *trainer, kinglet_error *err);

/* The adapter as it is after the steps so far. */
kinglet_status kinglet_trainer_adapter(kinglet_trainer *trainer, kinglet_adapter **out, kinglet_error *err);

/* Writes what was trained (adapter.gguf and PEFT's files, or model.gguf) and report.html into the output folder. out,
   which may be NULL, gets the results as a JSON object: steps, ending, written_step, loss, validation, forgetting,
   tokens, seconds, files, notes. */
kinglet_status kinglet_trainer_finish(kinglet_trainer *trainer, char **out, kinglet_error *err);

/* Stops the call that is running, or else the next one, between two operations: it returns KINGLET_ERR_CANCELLED. Any
   thread, signal handlers too. */
void kinglet_trainer_cancel(const kinglet_trainer *trainer);

#ifdef __cplusplus
}
#endif

#endif
