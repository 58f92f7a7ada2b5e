/* Teaches a model by examples, then asks it.   train MODEL.gguf DATA.jsonl FOLDER "QUESTION"
 * A line of DATA is {"prompt": "...", "completion": "..."}. FOLDER gets the adapter, a report and checkpoints. */
#include <stdio.h>
#include <stdlib.h>
#include "kinglet.h"

static kinglet_error err;

static kinglet_status check(kinglet_status status) {
    if (status < 0) {
        fprintf(stderr, "%s\n", err.message);
        exit(1);
    }
    return status;
}

static void ask(kinglet_session *session, const char *question) {
    char request[4096];
    kinglet_generation *answer;
    kinglet_event event = {.struct_size = sizeof event};
    snprintf(request, sizeof request,
             "{\"max_tokens\": 24, \"sampling\": {\"temperature\": 0},"
             " \"messages\": [{\"role\": \"user\", \"content\": \"%s\"}]}",
             question);
    check(kinglet_generate(session, request, &answer, &err));
    while (check(kinglet_generation_next(answer, &event, &err)) == KINGLET_OK)
        if (event.kind == KINGLET_EVENT_TEXT) fwrite(event.text, 1, event.text_len, stdout);
    putchar('\n');
    kinglet_generation_free(answer);
}

int main(int argc, char **argv) {
    char config[4096];
    kinglet_model_options options = {.struct_size = sizeof options, .backend = "cpu"};
    kinglet_train_report report = {.struct_size = sizeof report};
    kinglet_model *model;
    kinglet_session *session;
    kinglet_trainer *trainer;
    kinglet_adapter *adapter;
    if (argc != 5) return 2;
    check(kinglet_model_open(argv[1], &options, &model, &err));
    check(kinglet_session_create(model, NULL, &session, &err));
    ask(session, argv[4]);

    snprintf(config, sizeof config,
             "{\"data\": \"%s\", \"output\": \"%s\", \"steps\": 60, \"warmup\": 5, \"lr\": 0.002, \"val_fraction\": 0}",
             argv[2], argv[3]);
    check(kinglet_trainer_create(model, config, &trainer, &err));
    while (check(kinglet_trainer_step(trainer, &report, &err)) == KINGLET_OK)
        fprintf(stderr, "step %d of %d, loss %.3f\n", (int)report.step, (int)report.steps, report.loss);
    check(kinglet_trainer_finish(trainer, NULL, &err));
    check(kinglet_trainer_adapter(trainer, &adapter, &err));
    kinglet_trainer_free(trainer);
    check(kinglet_session_set_adapters(session, (const kinglet_adapter *const *)&adapter, NULL, 1, &err));
    ask(session, argv[4]);
    kinglet_adapter_free(adapter);
    kinglet_session_free(session);
    kinglet_model_free(model);
    return 0;
}
