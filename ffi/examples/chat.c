/* Asks a model one question and shows the answer as it comes.   chat MODEL.gguf "QUESTION" */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "kinglet.h"

static void check(kinglet_status status, const kinglet_error *err) {
    if (status < 0) {
        fprintf(stderr, "%s\n", err->message);
        exit(1);
    }
}

int main(int argc, char **argv) {
    static char request[65536];
    kinglet_error err;
    kinglet_model *model;
    kinglet_session *session;
    kinglet_generation *answer;
    kinglet_event event = {.struct_size = sizeof event};
    kinglet_status status;
    if (argc != 3 || strlen(argv[2]) > 10000) return 2;
    check(kinglet_model_open(argv[1], NULL, &model, &err), &err);
    check(kinglet_session_create(model, NULL, &session, &err), &err);
    char *end = request + sprintf(request, "{\"max_tokens\": 200, \"messages\": [{\"role\": \"user\", \"content\": \"");
    for (const char *c = argv[2]; *c; c++) /* every byte that JSON forbids, and the quotes, as a number */
        end += sprintf(end, strchr("\"\\", *c) || (unsigned char)*c < 32 ? "\\u%04x" : "%c", (unsigned char)*c);
    strcpy(end, "\"}]}");
    check(kinglet_generate(session, request, &answer, &err), &err);
    while ((status = kinglet_generation_next(answer, &event, &err)) == KINGLET_OK)
        if (event.kind == KINGLET_EVENT_TEXT) {
            fwrite(event.text, 1, event.text_len, stdout);
            fflush(stdout);
        }
    check(status, &err);
    kinglet_model_free(model); /* any order will do: a session keeps its model alive */
    kinglet_generation_free(answer);
    kinglet_session_free(session);
    return 0;
}
