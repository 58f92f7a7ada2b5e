/* Holds the library to its silence: no output, no environment read, no exit, no thread at work behind a call that has
 * returned. Stands in the way of getenv, and prints what it catches.   quiet MODEL.gguf LESSONS.jsonl FOLDER */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "kinglet.h"

static int watching;

/* Found by the library before the system's. Drivers that the system loads may read what they like. */
char *getenv(const char *name) {
    char *(*systems)(const char *) = NULL;
    Dl_info caller;
    if (watching && dladdr(__builtin_return_address(0), &caller) && strstr(caller.dli_fname, "libkinglet"))
        printf("the library reads %s\n", name);
    *(void **)&systems = dlsym(RTLD_NEXT, "getenv");
    return systems ? systems(name) : NULL;
}

/* Ticks of processor time of all threads. */
static long ticks(void) {
    char path[300], line[1024];
    long sum = 0;
    struct dirent *thread;
    DIR *threads = opendir("/proc/self/task");
    while (threads && (thread = readdir(threads))) {
        snprintf(path, sizeof path, "/proc/self/task/%.20s/stat", thread->d_name);
        FILE *file = thread->d_name[0] == '.' ? NULL : fopen(path, "r");
        long user, system;
        const char *behind_name;
        if (file && fgets(line, sizeof line, file) && (behind_name = strrchr(line, ')')) &&
            sscanf(behind_name, ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %ld %ld", &user, &system) == 2)
            sum += user + system;
        if (file) fclose(file);
    }
    if (threads) closedir(threads);
    return sum;
}

int main(int argc, char **argv) {
    const char *request = "{\"messages\": [{\"role\": \"user\", \"content\": \"hello\"}], \"max_tokens\": 20}";
    struct timespec pause = {.tv_nsec = 500000000};
    kinglet_train_report report = {.struct_size = sizeof report};
    kinglet_event event = {.struct_size = sizeof event};
    kinglet_model *model;
    kinglet_session *session;
    kinglet_generation *answer;
    kinglet_trainer *trainer;
    char config[4096], *json;
    if (argc != 4) return 2;
    snprintf(config, sizeof config, "{\"data\": \"%s\", \"output\": \"%s\", \"steps\": 2, \"warmup\": 0}", argv[2], argv[3]);
    watching = 1;
    if (kinglet_model_open("/no/such/file", NULL, &model, NULL) != KINGLET_ERR_IO) return 3;
    if (kinglet_model_open(argv[1], NULL, &model, NULL)) return 4;
    if (kinglet_devices_json(&json, NULL)) return 5;
    kinglet_string_free(json);
    if (kinglet_session_create(model, NULL, &session, NULL)) return 6;
    if (kinglet_generate(session, "{", &answer, NULL) != KINGLET_ERR_ARG) return 7;
    if (kinglet_generate(session, request, &answer, NULL)) return 8;
    while (kinglet_generation_next(answer, &event, NULL) == KINGLET_OK) continue;
    kinglet_generation_free(answer);
    if (kinglet_trainer_create(model, config, &trainer, NULL)) return 9;
    while (kinglet_trainer_step(trainer, &report, NULL) == KINGLET_OK) continue;
    if (kinglet_trainer_finish(trainer, NULL, NULL)) return 10;
    /* Session and trainer, and their threads, are still there. */
    nanosleep(&pause, NULL);
    long before = ticks();
    nanosleep(&pause, NULL);
    if (ticks() - before > 2) printf("threads work behind the calls\n");
    kinglet_trainer_free(trainer);
    kinglet_session_free(session);
    kinglet_model_free(model);
    watching = 0;
    printf("silence\n");
    return 0;
}
