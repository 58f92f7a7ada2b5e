/* A client of version 1 of the ABI: calls every function once, and holds it to what it promised then. Frozen, like the
 * header beside it; it has to pass with every later library.   client MODEL.gguf LESSONS.jsonl FOLDER */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "kinglet.h"

#define REQUIRE(condition)                                                                     \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            fprintf(stderr, "line %d: %s: %d %s\n", __LINE__, #condition, err.code, err.message); \
            exit(1);                                                                           \
        }                                                                                      \
    } while (0)

static kinglet_error err;
static int messages;

static void on_message(void *user, int32_t level, const char *message) {
    (void)user;
    if (level >= 1 && message[0]) messages++;
}

static int32_t on_event(void *user, const kinglet_event *event) {
    int *pieces = user;
    return event->kind == KINGLET_EVENT_TEXT && ++*pieces == 3;
}

static void *cancel(void *generation) {
    kinglet_generation_cancel(generation);
    return NULL;
}

/* Takes the answer to its end; gives the tokens, and says why it ended. */
static size_t pull(kinglet_generation *answer, int32_t *tokens, size_t capacity, int32_t *reason) {
    kinglet_event event = {.struct_size = sizeof event};
    size_t count = 0;
    while (kinglet_generation_next(answer, &event, &err) == KINGLET_OK) {
        for (size_t i = 0; i < event.n_tokens && count < capacity; i++) tokens[count++] = event.tokens[i];
        if (event.kind == KINGLET_EVENT_END) *reason = event.end_reason;
    }
    REQUIRE(kinglet_generation_next(answer, &event, &err) == KINGLET_DONE);
    return count;
}

static void library(void) {
    char *json;
    REQUIRE(kinglet_abi_version() >= 1);
    REQUIRE(strlen(kinglet_version()) > 0);
    REQUIRE(kinglet_build_json(&json, &err) == KINGLET_OK && strstr(json, "\"abi\":"));
    kinglet_string_free(json);
    REQUIRE(kinglet_devices_json(&json, &err) == KINGLET_OK && strstr(json, "\"cpu\""));
    kinglet_string_free(json);
    REQUIRE(kinglet_set_log(on_message, NULL, 5, &err) == KINGLET_OK);
}

static void tokens(const kinglet_model *model) {
    const char *text = "the hat, \xe4\xbd\xa0\xe5\xa5\xbd";
    int32_t ids[32];
    char back[64];
    size_t count, length;
    REQUIRE(kinglet_tokenize(model, text, strlen(text), 0, NULL, 0, &count, &err) == KINGLET_ERR_TOO_SMALL);
    REQUIRE(count > 0 && count <= 32);
    REQUIRE(kinglet_tokenize(model, text, strlen(text), 0, ids, 32, &count, &err) == KINGLET_OK);
    REQUIRE(kinglet_detokenize(model, ids, count, 0, back, sizeof back, &length, &err) == KINGLET_OK);
    REQUIRE(length == strlen(text) && memcmp(back, text, length) == 0);
    REQUIRE(kinglet_token_bytes(model, ids[0], 0, back, sizeof back, &length, &err) == KINGLET_OK && length > 0);
}

static void sessions(kinglet_model *model) {
    kinglet_session_options options = {.struct_size = sizeof options, .context_tokens = 256, .kv_type = KINGLET_KV_F32};
    kinglet_memory memory = {.struct_size = sizeof memory};
    kinglet_session *session, *fork;
    int32_t ids[4] = {10, 20, 30, 40};
    float logits[4096], scores[3];
    size_t count;
    REQUIRE(kinglet_session_create(model, &options, &session, &err) == KINGLET_OK);
    REQUIRE(kinglet_session_feed(session, ids, 4, &err) == KINGLET_OK);
    REQUIRE(kinglet_session_token_count(session, &count, &err) == KINGLET_OK && count == 4);
    REQUIRE(kinglet_session_logits(session, logits, 4096, &count, &err) == KINGLET_OK && count > 256);
    REQUIRE(kinglet_session_fork(session, &fork, &err) == KINGLET_OK);
    REQUIRE(kinglet_session_rewind(fork, 2, &err) == KINGLET_OK);
    REQUIRE(kinglet_session_token_count(fork, &count, &err) == KINGLET_OK && count == 2);
    REQUIRE(kinglet_session_reset(fork, &err) == KINGLET_OK);
    REQUIRE(kinglet_session_score(fork, ids, 4, scores, 3, &err) == KINGLET_OK && scores[0] < 0);
    REQUIRE(kinglet_session_memory(fork, &memory, &err) == KINGLET_OK && memory.total > memory.weights);
    REQUIRE(kinglet_session_feed(fork, NULL, 3, &err) == KINGLET_ERR_ARG && err.code == KINGLET_ERR_ARG);
    kinglet_session_cancel(fork);
    kinglet_session_free(fork);
    kinglet_session_free(session);
}

static void generations(kinglet_model *model) {
    const char *greedy = "{\"messages\": [{\"role\": \"user\", \"content\": \"hello you\"}], \"max_tokens\": 8,"
                         " \"ignore_end\": true, \"sampling\": {\"temperature\": 0}}";
    kinglet_session *session;
    kinglet_generation *answer, *again;
    int32_t first[8], second[8], reason = 0;
    int pieces = 0;
    pthread_t thread;
    REQUIRE(kinglet_session_create(model, NULL, &session, &err) == KINGLET_OK);
    REQUIRE(kinglet_generate(session, greedy, &answer, &err) == KINGLET_OK);
    REQUIRE(kinglet_generate(session, greedy, &again, &err) == KINGLET_ERR_BUSY && again == NULL);
    REQUIRE(pull(answer, first, 8, &reason) == 8 && reason == KINGLET_END_LENGTH);
    REQUIRE(kinglet_generate(session, greedy, &again, &err) == KINGLET_OK);
    REQUIRE(pull(again, second, 8, &reason) == 8 && memcmp(first, second, sizeof first) == 0);
    kinglet_generation_free(again);
    kinglet_generation_free(answer);
    REQUIRE(kinglet_generate(session, "{\"prompt\": \"a\", \"ignore_end\": true}", &answer, &err) == KINGLET_OK);
    REQUIRE(pthread_create(&thread, NULL, cancel, answer) == 0 && pthread_join(thread, NULL) == 0);
    pull(answer, first, 8, &reason);
    REQUIRE(reason == KINGLET_END_CANCELLED);
    kinglet_generation_free(answer);
    REQUIRE(kinglet_generate_with(session, greedy, on_event, &pieces, &err) == KINGLET_OK && pieces == 3);
    REQUIRE(kinglet_generate(session, "{\"propmt\": \"a\"}", &answer, &err) == KINGLET_ERR_ARG);
    REQUIRE(strstr(err.message, "propmt") != NULL);
    kinglet_session_free(session);
}

static void training(kinglet_model *model, const char *lessons, const char *folder) {
    char config[4096], path[4096], merged[4096], *json;
    kinglet_train_report report = {.struct_size = sizeof report};
    kinglet_trainer *trainer;
    kinglet_adapter *adapter, *opened;
    kinglet_session *session;
    float half = 0.5f;
    snprintf(config, sizeof config, "{\"data\": \"%s\", \"output\": \"%s/t\", \"steps\": 2, \"warmup\": 0, \"val_fraction\": 0}",
             lessons, folder);
    snprintf(path, sizeof path, "%s/t/adapter.gguf", folder);
    snprintf(merged, sizeof merged, "%s/merged.gguf", folder);
    REQUIRE(kinglet_trainer_create(model, config, &trainer, &err) == KINGLET_OK);
    REQUIRE(kinglet_trainer_info_json(trainer, &json, &err) == KINGLET_OK && strstr(json, "\"steps\":2"));
    kinglet_string_free(json);
    kinglet_trainer_cancel(trainer);
    REQUIRE(kinglet_trainer_step(trainer, &report, &err) == KINGLET_ERR_CANCELLED);
    REQUIRE(kinglet_trainer_step(trainer, &report, &err) == KINGLET_OK);
    REQUIRE(report.kind == KINGLET_TRAIN_STEP && report.step == 1 && report.steps == 2 && report.loss > 0);
    REQUIRE(kinglet_trainer_save(trainer, &err) == KINGLET_OK);
    REQUIRE(kinglet_trainer_step(trainer, &report, &err) == KINGLET_OK);
    REQUIRE(kinglet_trainer_step(trainer, &report, &err) == KINGLET_DONE);
    REQUIRE(kinglet_trainer_finish(trainer, &json, &err) == KINGLET_OK && strstr(json, "adapter.gguf"));
    kinglet_string_free(json);
    REQUIRE(kinglet_trainer_adapter(trainer, &adapter, &err) == KINGLET_OK);
    kinglet_trainer_free(trainer);
    REQUIRE(kinglet_adapter_open(model, path, &opened, &err) == KINGLET_OK);
    REQUIRE(kinglet_adapter_info_json(opened, &json, &err) == KINGLET_OK && strstr(json, "\"rank\":8"));
    kinglet_string_free(json);
    const kinglet_adapter *both[2] = {adapter, opened};
    float scales[2] = {1.0f, 0.25f};
    REQUIRE(kinglet_session_create(model, NULL, &session, &err) == KINGLET_OK);
    REQUIRE(kinglet_session_set_adapters(session, both, scales, 2, &err) == KINGLET_OK);
    REQUIRE(kinglet_adapter_merge(model, both, &half, 1, merged, "F16", &err) == KINGLET_OK);
    kinglet_adapter_free(adapter);
    kinglet_adapter_free(opened);
    kinglet_session_free(session);
    REQUIRE(kinglet_model_open(merged, NULL, &model, &err) == KINGLET_OK);
    kinglet_model_free(model);
}

/* As open_memory promises: called once, when the model is gone. */
static void release(void *user) {
    free(user);
    messages = -1000000;
}

static void other_ways_to_open(const char *path) {
    kinglet_memory memory = {.struct_size = sizeof memory};
    kinglet_model *model;
    FILE *file = fopen(path, "rb");
    size_t size;
    char *bytes;
    REQUIRE(file && fseek(file, 0, SEEK_END) == 0);
    size = (size_t)ftell(file);
    rewind(file);
    REQUIRE(kinglet_model_open_fd(fileno(file), 0, 0, NULL, &model, &err) == KINGLET_OK);
    kinglet_model_free(model);
    bytes = malloc(size);
    rewind(file);
    REQUIRE(bytes && fread(bytes, 1, size, file) == size);
    fclose(file);
    REQUIRE(kinglet_model_open_memory(bytes, size / 2, release, bytes, NULL, &model, &err) == KINGLET_ERR_FORMAT);
    REQUIRE(kinglet_model_open_memory(bytes, size, release, bytes, NULL, &model, &err) == KINGLET_OK);
    REQUIRE(kinglet_model_retain(model, &err) == KINGLET_OK);
    kinglet_model_free(model);
    REQUIRE(messages >= 0);
    kinglet_model_free(model);
    REQUIRE(messages < 0);
    REQUIRE(kinglet_model_estimate(path, NULL, NULL, &memory, &err) == KINGLET_OK && memory.weights == size);
}

int main(int argc, char **argv) {
    kinglet_model_options options = {.struct_size = sizeof options, .backend = "cpu", .threads = 2};
    kinglet_model *model;
    char *json;
    if (argc != 4) return 2;
    library();
    REQUIRE(kinglet_model_open("/no/such/file", &options, &model, &err) == KINGLET_ERR_IO && model == NULL);
    REQUIRE(kinglet_model_open(argv[1], &options, &model, &err) == KINGLET_OK);
    REQUIRE(kinglet_model_info_json(model, &json, &err) == KINGLET_OK && strstr(json, "\"family\":\"llama\""));
    kinglet_string_free(json);
    REQUIRE(kinglet_model_chat_template(model, &json, &err) == KINGLET_OK && strstr(json, "im_start"));
    kinglet_string_free(json);
    tokens(model);
    sessions(model);
    generations(model);
    training(model, argv[2], argv[3]);
    kinglet_model_free(model);
    other_ways_to_open(argv[1]);
    REQUIRE(kinglet_set_log(NULL, NULL, 0, &err) == KINGLET_OK);
    puts("all calls of version 1 do what they did");
    return 0;
}
