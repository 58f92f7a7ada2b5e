/* Prints the most probable tokens behind a text, from a model opened by its path and again from memory, which must agree: the
 * same line on every target.   tokens MODEL.gguf */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "kinglet.h"

enum { MOST = 48 };

static kinglet_error err;

static void check(kinglet_status status) {
    if (status >= 0) return;
    fprintf(stderr, "%d: %s\n", (int)status, err.message);
    exit(1);
}

/* Answers the request of the test in node. Gives the number of tokens. */
static size_t generate(kinglet_model *model, int32_t *tokens) {
    const char *request = "{\"prompt\": \"what is on the table\", \"max_tokens\": 48, \"ignore_end\": true, "
                          "\"sampling\": {\"temperature\": 0}}";
    kinglet_event event = {.struct_size = sizeof event};
    kinglet_session *session;
    kinglet_generation *answer;
    kinglet_status status;
    size_t count = 0;
    check(kinglet_session_create(model, NULL, &session, &err));
    check(kinglet_generate(session, request, &answer, &err));
    while ((status = kinglet_generation_next(answer, &event, &err)) == KINGLET_OK)
        for (size_t i = 0; i < event.n_tokens && count < MOST; i++) tokens[count++] = event.tokens[i];
    check(status);
    kinglet_generation_free(answer);
    kinglet_session_free(session);
    return count;
}

int main(int argc, char **argv) {
    kinglet_model_options options = {.struct_size = sizeof options, .backend = "cpu"};
    int32_t mapped[MOST], given[MOST];
    kinglet_model *model;
    if (argc != 2) return 2;
    check(kinglet_model_open(argv[1], &options, &model, &err));
    size_t count = generate(model, mapped);
    kinglet_model_free(model);

    FILE *file = fopen(argv[1], "rb");
    if (!file || fseek(file, 0, SEEK_END)) return 3;
    size_t length = (size_t)ftell(file);
    void *bytes = malloc(length);
    rewind(file);
    if (!bytes || fread(bytes, 1, length, file) != length) return 4;
    check(kinglet_model_open_memory(bytes, length, NULL, NULL, &options, &model, &err));
    if (generate(model, given) != count || memcmp(mapped, given, count * sizeof *given)) {
        fprintf(stderr, "from memory the model says something else\n");
        return 5;
    }
    kinglet_model_free(model);
    free(bytes);
    fclose(file);
    for (size_t i = 0; i < count; i++) printf(i ? " %d" : "%d", (int)mapped[i]);
    putchar('\n');
    return count == MOST ? 0 : 6;
}
