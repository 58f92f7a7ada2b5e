/* Prompts and decoding on llama.cpp's Vulkan backend, timed as `kinglet bench` times them: 512 tokens into an empty window, then
 * 64 tokens one by one; five lines, after a round that warms up.
 *
 * The libraries are those of the npm package @node-llama-cpp/linux-x64-vulkan, built by its authors with every extension its
 * shaders know (NV_coopmat2 among them); no header comes with it, so the functions are declared here and structures that are
 * passed by value are larger than theirs.
 *
 *   npm pack @node-llama-cpp/linux-x64-vulkan && tar xzf node-llama-cpp-*.tgz
 *   L=$PWD/package/bins/linux-x64-vulkan
 *   gcc -O2 -o llama_vulkan llama_vulkan.c $L/libllama.vulkan.*.so $L/libggml.vulkan.*.so -Wl,--allow-shlib-undefined
 *   LD_LIBRARY_PATH=$L ./llama_vulkan $L MODEL.gguf
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef struct {
    char bytes[512];
} model_params;

typedef union {
    struct {
        uint32_t n_ctx, n_batch, n_ubatch;
    } first;
    char bytes[1024];
} context_params;

typedef struct {
    int32_t n_tokens;
    int32_t *token;
    float *embd;
    int32_t *pos;
    int32_t *n_seq_id;
    int32_t **seq_id;
    int8_t *logits;
} batch;

void ggml_backend_load_all_from_path(const char *folder);
void llama_backend_init(void);
model_params llama_model_default_params(void);
context_params llama_context_default_params(void);
void *llama_model_load_from_file(const char *path, model_params params);
void *llama_init_from_model(void *model, context_params params);
batch llama_batch_get_one(int32_t *tokens, int32_t count);
int32_t llama_decode(void *context, batch batch);
void llama_synchronize(void *context);
void *llama_get_memory(const void *context);
void llama_memory_clear(void *memory, bool data);
float *llama_get_logits(void *context);

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static float step(void *context, int32_t *tokens, int32_t count) {
    if (llama_decode(context, llama_batch_get_one(tokens, count))) {
        exit(1);
    }
    llama_synchronize(context);
    return llama_get_logits(context)[0];
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: llama_vulkan FOLDER_OF_LIBRARIES MODEL.gguf\n");
        return 2;
    }
    ggml_backend_load_all_from_path(argv[1]);
    llama_backend_init();
    void *model = llama_model_load_from_file(argv[2], llama_model_default_params());
    context_params params = llama_context_default_params();
    params.first.n_ctx = 1024;
    params.first.n_batch = params.first.n_ubatch = 512;
    void *context = model ? llama_init_from_model(model, params) : NULL;
    if (!context) {
        return 1;
    }
    int32_t tokens[512];
    for (int i = 0; i < 512; i++) {
        tokens[i] = 100 + (i * 7919) % 30000;
    }
    float sum = 0;
    for (int round = 0; round < 6; round++) {
        llama_memory_clear(llama_get_memory(context), true);
        double prompt = now();
        sum += step(context, tokens, 512);
        prompt = now() - prompt;
        llama_memory_clear(llama_get_memory(context), true);
        double decoding = now();
        for (int i = 0; i < 64; i++) {
            sum += step(context, tokens + i, 1);
        }
        decoding = now() - decoding;
        if (round > 0) {
            printf("pp512 %.1f tg64 %.1f\n", 512 / prompt, 64 / decoding);
        }
    }
    /* What was computed is used; the libraries' own end of the process is not waited for. */
    fprintf(stderr, "%f\n", sum);
    fflush(stdout);
    _Exit(0);
}
