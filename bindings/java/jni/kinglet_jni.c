/* The functions of kinglet.h for Java, one for one; Jni.java declares them. Nothing is decided here: numbers, arrays and
 * UTF-8 are carried over, and an error becomes a KingletException.
 *
 *     javac -h HEADERS -d CLASSES src/kinglet/(all).java
 *     cc -shared -fPIC jni/kinglet_jni.c -IHEADERS -I$JAVA_HOME/include -I$JAVA_HOME/include/linux -lkinglet -o libkinglet_jni.so
 */
#include <stdlib.h>
#include <string.h>
#include "kinglet.h"
#include "kinglet_Jni.h"
#include "kinglet_KingletException.h"

#define NATIVE(type, name) JNIEXPORT type JNICALL Java_kinglet_Jni_##name
#define SAME(java, c) _Static_assert((java) == (c), #java " is not " #c)

SAME(kinglet_Jni_MODEL_VALIDATE, KINGLET_MODEL_VALIDATE);
SAME(kinglet_Jni_MODEL_COPY, KINGLET_MODEL_COPY);
SAME(kinglet_Jni_TUNE_INT8, KINGLET_TUNE_INT8);
SAME(kinglet_Jni_TOKENIZE_SPECIAL, KINGLET_TOKENIZE_SPECIAL);
SAME(kinglet_Jni_TOKENIZE_CONTROL, KINGLET_TOKENIZE_CONTROL);
SAME(kinglet_Jni_DETOKENIZE_CONTROL, KINGLET_DETOKENIZE_CONTROL);
SAME(kinglet_Jni_KV_F16, KINGLET_KV_F16);
SAME(kinglet_Jni_KV_F32, KINGLET_KV_F32);
SAME(kinglet_Jni_KV_Q8_0, KINGLET_KV_Q8_0);
SAME(kinglet_Jni_EVENT_TEXT, KINGLET_EVENT_TEXT);
SAME(kinglet_Jni_EVENT_END, KINGLET_EVENT_END);
SAME(kinglet_Jni_END_OF_TEXT, KINGLET_END_OF_TEXT);
SAME(kinglet_Jni_END_LENGTH, KINGLET_END_LENGTH);
SAME(kinglet_Jni_END_STOP, KINGLET_END_STOP);
SAME(kinglet_Jni_END_CONTEXT_FULL, KINGLET_END_CONTEXT_FULL);
SAME(kinglet_Jni_END_CANCELLED, KINGLET_END_CANCELLED);
SAME(kinglet_Jni_TRAIN_ROLLED_BACK, KINGLET_TRAIN_ROLLED_BACK);
SAME(kinglet_KingletException_ARG, KINGLET_ERR_ARG);
SAME(kinglet_KingletException_IO, KINGLET_ERR_IO);
SAME(kinglet_KingletException_FORMAT, KINGLET_ERR_FORMAT);
SAME(kinglet_KingletException_UNSUPPORTED, KINGLET_ERR_UNSUPPORTED);
SAME(kinglet_KingletException_MEMORY, KINGLET_ERR_MEMORY);
SAME(kinglet_KingletException_CONTEXT_FULL, KINGLET_ERR_CONTEXT_FULL);
SAME(kinglet_KingletException_BUSY, KINGLET_ERR_BUSY);
SAME(kinglet_KingletException_CANCELLED, KINGLET_ERR_CANCELLED);
SAME(kinglet_KingletException_DEVICE_LOST, KINGLET_ERR_DEVICE_LOST);
SAME(kinglet_KingletException_SUSPENDED, KINGLET_ERR_SUSPENDED);
SAME(kinglet_KingletException_NUMERIC, KINGLET_ERR_NUMERIC);
SAME(kinglet_KingletException_INTERNAL, KINGLET_ERR_INTERNAL);
_Static_assert(sizeof(jint) == sizeof(int32_t) && sizeof(jfloat) == sizeof(float), "arrays are carried over as they are");

static jclass exception_class, piece_class;
static jmethodID new_exception, new_piece;

static jclass find(JNIEnv *env, const char *name) {
    jclass local = (*env)->FindClass(env, name);
    return local ? (*env)->NewGlobalRef(env, local) : NULL;
}

JNIEXPORT jint JNICALL JNI_OnLoad(JavaVM *vm, void *reserved) {
    JNIEnv *env;
    (void)reserved;
    if ((*vm)->GetEnv(vm, (void **)&env, JNI_VERSION_1_6) != JNI_OK) return JNI_ERR;
    exception_class = find(env, "kinglet/KingletException");
    piece_class = find(env, "kinglet/Piece");
    if (!exception_class || !piece_class) return JNI_ERR;
    new_exception = (*env)->GetMethodID(env, exception_class, "<init>", "(I[B)V");
    new_piece = (*env)->GetMethodID(env, piece_class, "<init>", "([B[I)V");
    return new_exception && new_piece ? JNI_VERSION_1_6 : JNI_ERR;
}

/* ------------------------------------------------------------------------------------------------- To Java -- */

/* NULL where Java has no memory left; its error is pending then, as with every function here. */
static jbyteArray bytes(JNIEnv *env, const void *from, size_t length) {
    jbyteArray out = (*env)->NewByteArray(env, (jsize)length);
    if (out) (*env)->SetByteArrayRegion(env, out, 0, (jsize)length, from);
    return out;
}

static jintArray ints(JNIEnv *env, const int32_t *from, size_t length) {
    jintArray out = (*env)->NewIntArray(env, (jsize)length);
    if (out) (*env)->SetIntArrayRegion(env, out, 0, (jsize)length, from);
    return out;
}

static jfloatArray floats(JNIEnv *env, const float *from, size_t length) {
    jfloatArray out = (*env)->NewFloatArray(env, (jsize)length);
    if (out) (*env)->SetFloatArrayRegion(env, out, 0, (jsize)length, from);
    return out;
}

static void throw(JNIEnv *env, int32_t code, const char *message) {
    jbyteArray text = bytes(env, message, strlen(message));
    if (text) (*env)->Throw(env, (*env)->NewObject(env, exception_class, new_exception, code, text));
}

/* Whether the call failed; the exception is pending then. */
static int failed(JNIEnv *env, kinglet_status status, const kinglet_error *err) {
    if (status < 0) throw(env, status, err->message);
    return status < 0;
}

/* Whether there is no memory for what the library is to fill. */
static int none(JNIEnv *env, const void *memory) {
    if (!memory) throw(env, KINGLET_ERR_MEMORY, "there is no memory for the result");
    return !memory;
}

/* A string of the library's, which is freed. */
static jbyteArray string(JNIEnv *env, kinglet_status status, const kinglet_error *err, char *text) {
    if (failed(env, status, err) || !text) return NULL;
    jbyteArray out = bytes(env, text, strlen(text));
    kinglet_string_free(text);
    return out;
}

static jlong pointer(JNIEnv *env, kinglet_status status, const kinglet_error *err, const void *object) {
    return failed(env, status, err) ? 0 : (jlong)(intptr_t)object;
}

static jlongArray memory(JNIEnv *env, kinglet_status status, const kinglet_error *err, const kinglet_memory *m) {
    if (failed(env, status, err)) return NULL;
    const jlong fields[] = {(jlong)m->weights,  (jlong)m->kv_cache, (jlong)m->activations, (jlong)m->scratch,
                            (jlong)m->adapters, (jlong)m->total,    (jlong)m->mapped};
    jlongArray out = (*env)->NewLongArray(env, 7);
    if (out) (*env)->SetLongArrayRegion(env, out, 0, 7, fields);
    return out;
}

/* ----------------------------------------------------------------------------------------------- From Java -- */

#define POINTER(type, value) ((kinglet_##type *)(intptr_t)(value))

/* Elements of an array; NULL for NULL. What was taken is dropped. */
static jbyte *take_bytes(JNIEnv *env, jbyteArray array) {
    return array ? (*env)->GetByteArrayElements(env, array, NULL) : NULL;
}

static void drop_bytes(JNIEnv *env, jbyteArray array, jbyte *elements) {
    if (elements) (*env)->ReleaseByteArrayElements(env, array, elements, JNI_ABORT);
}

static size_t length_of(JNIEnv *env, jarray array) { return array ? (size_t)(*env)->GetArrayLength(env, array) : 0; }

/* Options, and the texts in them, which are taken. */
typedef struct {
    kinglet_model_options options;
    jbyteArray backend, folder;
} model_options;

/* The numbers are those of Model.Options.numbers. */
static model_options take_options(JNIEnv *env, jbyteArray backend, jbyteArray folder, jlongArray numbers) {
    model_options all = {.options = {.struct_size = sizeof all.options}, .backend = backend, .folder = folder};
    jlong number[8] = {0};
    (*env)->GetLongArrayRegion(env, numbers, 0, 8, number);
    all.options.flags = (uint32_t)number[0];
    all.options.threads = (int32_t)number[1];
    all.options.memory_budget = number[2] < 0 ? 0 : (uint64_t)number[2];
    all.options.prefix_cache = number[3] < 0 ? 0 : (uint64_t)number[3];
    all.options.gpu_layers = (int32_t)number[4];
    all.options.gpu_memory = number[5] < 0 ? 0 : (uint64_t)number[5];
    all.options.tuning = (uint32_t)number[6];
    all.options.gpu_import = (int32_t)number[7];
    all.options.backend = (const char *)take_bytes(env, backend);
    all.options.tuning_folder = (const char *)take_bytes(env, folder);
    return all;
}

static void drop_options(JNIEnv *env, const model_options *all) {
    drop_bytes(env, all->backend, (jbyte *)(intptr_t)all->options.backend);
    drop_bytes(env, all->folder, (jbyte *)(intptr_t)all->options.tuning_folder);
}

static kinglet_session_options session_options(jint context, jint kv, jint chunk) {
    kinglet_session_options options = {.struct_size = sizeof options};
    options.context_tokens = context;
    options.kv_type = kv;
    options.chunk_tokens = chunk;
    return options;
}

/* Pointers and scales, which Java has as many of. */
typedef struct {
    const kinglet_adapter **adapters;
    jlong *pointers;
    jfloat *scales;
    size_t count;
} adapters;

static adapters take_adapters(JNIEnv *env, jlongArray pointers, jfloatArray scales) {
    adapters all = {.count = length_of(env, pointers)};
    all.pointers = (*env)->GetLongArrayElements(env, pointers, NULL);
    all.scales = (*env)->GetFloatArrayElements(env, scales, NULL);
    all.adapters = malloc((all.count + 1) * sizeof *all.adapters);
    for (size_t i = 0; all.adapters && all.pointers && i < all.count; i++)
        all.adapters[i] = POINTER(adapter, all.pointers[i]);
    return all;
}

static int lacks(JNIEnv *env, const adapters *all) {
    return none(env, all->pointers && all->scales ? all->adapters : NULL);
}

static void drop_adapters(JNIEnv *env, adapters *all, jlongArray pointers, jfloatArray scales) {
    if (all->pointers) (*env)->ReleaseLongArrayElements(env, pointers, all->pointers, JNI_ABORT);
    if (all->scales) (*env)->ReleaseFloatArrayElements(env, scales, all->scales, JNI_ABORT);
    free(all->adapters);
}

/* ------------------------------------------------------------------------------------------------- Library -- */

NATIVE(jbyteArray, version)(JNIEnv *env, jclass jni) {
    (void)jni;
    return bytes(env, kinglet_version(), strlen(kinglet_version()));
}

NATIVE(jbyteArray, buildJson)(JNIEnv *env, jclass jni) {
    kinglet_error err;
    char *out = NULL;
    (void)jni;
    kinglet_status status = kinglet_build_json(&out, &err);
    return string(env, status, &err, out);
}

NATIVE(jbyteArray, devicesJson)(JNIEnv *env, jclass jni) {
    kinglet_error err;
    char *out = NULL;
    (void)jni;
    kinglet_status status = kinglet_devices_json(&out, &err);
    return string(env, status, &err, out);
}

/* -------------------------------------------------------------------------------------------------- Models -- */

NATIVE(jlongArray, estimate)
(JNIEnv *env, jclass jni, jbyteArray path, jbyteArray backend, jbyteArray folder, jlongArray numbers, jint context,
 jint kv, jint chunk) {
    kinglet_error err;
    kinglet_memory out = {.struct_size = sizeof out};
    jbyte *p = take_bytes(env, path);
    model_options model = take_options(env, backend, folder, numbers);
    kinglet_session_options session = session_options(context, kv, chunk);
    (void)jni;
    kinglet_status status = kinglet_model_estimate((const char *)p, &model.options, &session, &out, &err);
    drop_bytes(env, path, p);
    drop_options(env, &model);
    return memory(env, status, &err, &out);
}

NATIVE(jlong, modelOpen)
(JNIEnv *env, jclass jni, jbyteArray path, jbyteArray backend, jbyteArray folder, jlongArray numbers) {
    kinglet_error err;
    kinglet_model *out = NULL;
    jbyte *p = take_bytes(env, path);
    model_options model = take_options(env, backend, folder, numbers);
    (void)jni;
    kinglet_status status = kinglet_model_open((const char *)p, &model.options, &out, &err);
    drop_bytes(env, path, p);
    drop_options(env, &model);
    return pointer(env, status, &err, out);
}

NATIVE(jlong, modelOpenFd)
(JNIEnv *env, jclass jni, jint fd, jlong offset, jlong length, jbyteArray backend, jbyteArray folder,
 jlongArray numbers) {
    kinglet_error err;
    kinglet_model *out = NULL;
    model_options model = take_options(env, backend, folder, numbers);
    (void)jni;
    kinglet_status status = kinglet_model_open_fd(fd, (uint64_t)offset, (uint64_t)length, &model.options, &out, &err);
    drop_options(env, &model);
    return pointer(env, status, &err, out);
}

NATIVE(jlong, modelOpenMemory)
(JNIEnv *env, jclass jni, jbyteArray content, jbyteArray backend, jbyteArray folder, jlongArray numbers) {
    kinglet_error err;
    kinglet_model *out = NULL;
    jbyte *c = take_bytes(env, content);
    model_options model = take_options(env, backend, folder, numbers);
    (void)jni;
    kinglet_status status =
        kinglet_model_open_memory(c, length_of(env, content), NULL, NULL, &model.options, &out, &err);
    drop_bytes(env, content, c);
    drop_options(env, &model);
    return pointer(env, status, &err, out);
}

NATIVE(void, modelFree)(JNIEnv *env, jclass jni, jlong model) {
    (void)env, (void)jni;
    kinglet_model_free(POINTER(model, model));
}

NATIVE(jlong, modelTrim)(JNIEnv *env, jclass jni, jlong model) {
    kinglet_error err;
    uint64_t freed = 0;
    (void)jni;
    failed(env, kinglet_model_trim(POINTER(model, model), &freed, &err), &err);
    return (jlong)freed;
}

NATIVE(void, modelSuspend)(JNIEnv *env, jclass jni, jlong model) {
    kinglet_error err;
    (void)jni;
    failed(env, kinglet_model_suspend(POINTER(model, model), &err), &err);
}

NATIVE(void, modelResume)(JNIEnv *env, jclass jni, jlong model) {
    kinglet_error err;
    (void)jni;
    failed(env, kinglet_model_resume(POINTER(model, model), &err), &err);
}

NATIVE(jbyteArray, modelInfoJson)(JNIEnv *env, jclass jni, jlong model) {
    kinglet_error err;
    char *out = NULL;
    (void)jni;
    kinglet_status status = kinglet_model_info_json(POINTER(model, model), &out, &err);
    return string(env, status, &err, out);
}

NATIVE(jbyteArray, modelChatTemplate)(JNIEnv *env, jclass jni, jlong model) {
    kinglet_error err;
    char *out = NULL;
    (void)jni;
    kinglet_status status = kinglet_model_chat_template(POINTER(model, model), &out, &err);
    return string(env, status, &err, out);
}

/* -------------------------------------------------------------------------------------------------- Tokens -- */

NATIVE(jintArray, tokenize)(JNIEnv *env, jclass jni, jlong model, jbyteArray text, jint flags) {
    kinglet_error err;
    size_t length = length_of(env, text), count = 0;
    /* A token has a byte at least, but for those around the text. */
    size_t capacity = length + 16;
    int32_t *ids = malloc(capacity * sizeof *ids);
    jintArray out = NULL;
    jbyte *t = take_bytes(env, text);
    (void)jni;
    if (!none(env, ids) &&
        !failed(env,
                kinglet_tokenize(POINTER(model, model), (const char *)t, length, (uint32_t)flags, ids, capacity, &count, &err),
                &err))
        out = ints(env, ids, count);
    drop_bytes(env, text, t);
    free(ids);
    return out;
}

NATIVE(jbyteArray, detokenize)(JNIEnv *env, jclass jni, jlong model, jintArray tokens, jint flags) {
    kinglet_error err;
    size_t n = length_of(env, tokens), length = 0;
    jint *ids = (*env)->GetIntArrayElements(env, tokens, NULL);
    const kinglet_model *m = POINTER(model, model);
    jbyteArray out = NULL;
    (void)jni;
    kinglet_status status = kinglet_detokenize(m, ids, n, (uint32_t)flags, NULL, 0, &length, &err);
    if (status == KINGLET_ERR_TOO_SMALL || !failed(env, status, &err)) {
        char *text = malloc(length + 1);
        if (!none(env, text) &&
            !failed(env, kinglet_detokenize(m, ids, n, (uint32_t)flags, text, length, &length, &err), &err))
            out = bytes(env, text, length);
        free(text);
    }
    (*env)->ReleaseIntArrayElements(env, tokens, ids, JNI_ABORT);
    return out;
}

NATIVE(jbyteArray, tokenBytes)(JNIEnv *env, jclass jni, jlong model, jint token, jint flags) {
    kinglet_error err;
    char content[4096];
    size_t length = 0;
    (void)jni;
    kinglet_status status =
        kinglet_token_bytes(POINTER(model, model), token, (uint32_t)flags, content, sizeof content, &length, &err);
    return failed(env, status, &err) ? NULL : bytes(env, content, length);
}

/* ------------------------------------------------------------------------------------------------ Sessions -- */

NATIVE(jlong, sessionCreate)(JNIEnv *env, jclass jni, jlong model, jint context, jint kv, jint chunk) {
    kinglet_error err;
    kinglet_session *out = NULL;
    kinglet_session_options options = session_options(context, kv, chunk);
    (void)jni;
    kinglet_status status = kinglet_session_create(POINTER(model, model), &options, &out, &err);
    return pointer(env, status, &err, out);
}

NATIVE(void, sessionFree)(JNIEnv *env, jclass jni, jlong session) {
    (void)env, (void)jni;
    kinglet_session_free(POINTER(session, session));
}

NATIVE(jlong, sessionFork)(JNIEnv *env, jclass jni, jlong session) {
    kinglet_error err;
    kinglet_session *out = NULL;
    (void)jni;
    kinglet_status status = kinglet_session_fork(POINTER(session, session), &out, &err);
    return pointer(env, status, &err, out);
}

NATIVE(void, sessionRewind)(JNIEnv *env, jclass jni, jlong session, jlong tokens) {
    kinglet_error err;
    (void)jni;
    failed(env, kinglet_session_rewind(POINTER(session, session), (size_t)tokens, &err), &err);
}

NATIVE(jlong, sessionTokenCount)(JNIEnv *env, jclass jni, jlong session) {
    kinglet_error err;
    size_t count = 0;
    (void)jni;
    failed(env, kinglet_session_token_count(POINTER(session, session), &count, &err), &err);
    return (jlong)count;
}

NATIVE(jlongArray, sessionMemory)(JNIEnv *env, jclass jni, jlong session) {
    kinglet_error err;
    kinglet_memory out = {.struct_size = sizeof out};
    (void)jni;
    kinglet_status status = kinglet_session_memory(POINTER(session, session), &out, &err);
    return memory(env, status, &err, &out);
}

NATIVE(void, sessionSetAdapters)(JNIEnv *env, jclass jni, jlong session, jlongArray pointers, jfloatArray scales) {
    kinglet_error err;
    adapters all = take_adapters(env, pointers, scales);
    (void)jni;
    if (!lacks(env, &all))
        failed(env, kinglet_session_set_adapters(POINTER(session, session), all.adapters, all.scales, all.count, &err), &err);
    drop_adapters(env, &all, pointers, scales);
}

NATIVE(void, sessionFeed)(JNIEnv *env, jclass jni, jlong session, jintArray tokens) {
    kinglet_error err;
    jint *ids = (*env)->GetIntArrayElements(env, tokens, NULL);
    (void)jni;
    kinglet_status status = kinglet_session_feed(POINTER(session, session), ids, length_of(env, tokens), &err);
    (*env)->ReleaseIntArrayElements(env, tokens, ids, JNI_ABORT);
    failed(env, status, &err);
}

NATIVE(jfloatArray, sessionLogits)(JNIEnv *env, jclass jni, jlong session) {
    kinglet_error err;
    size_t count = 0;
    kinglet_session *s = POINTER(session, session);
    jfloatArray out = NULL;
    (void)jni;
    kinglet_status status = kinglet_session_logits(s, NULL, 0, &count, &err);
    if (status != KINGLET_ERR_TOO_SMALL && failed(env, status, &err)) return NULL;
    float *logits = malloc((count + 1) * sizeof *logits);
    if (!none(env, logits) && !failed(env, kinglet_session_logits(s, logits, count, &count, &err), &err))
        out = floats(env, logits, count);
    free(logits);
    return out;
}

NATIVE(jfloatArray, sessionScore)(JNIEnv *env, jclass jni, jlong session, jintArray tokens) {
    kinglet_error err;
    size_t n = length_of(env, tokens), count = n ? n - 1 : 0;
    jint *ids = (*env)->GetIntArrayElements(env, tokens, NULL);
    float *scores = malloc((count + 1) * sizeof *scores);
    jfloatArray out = NULL;
    (void)jni;
    if (!none(env, scores) &&
        !failed(env, kinglet_session_score(POINTER(session, session), ids, n, scores, count, &err), &err))
        out = floats(env, scores, count);
    free(scores);
    (*env)->ReleaseIntArrayElements(env, tokens, ids, JNI_ABORT);
    return out;
}

NATIVE(jfloatArray, sessionEmbed)(JNIEnv *env, jclass jni, jlong session, jintArray tokens) {
    kinglet_error err;
    size_t n = length_of(env, tokens), count = 0;
    kinglet_session *s = POINTER(session, session);
    jint *ids = (*env)->GetIntArrayElements(env, tokens, NULL);
    jfloatArray out = NULL;
    (void)jni;
    kinglet_status status = kinglet_session_embed(s, ids, n, NULL, 0, &count, &err);
    if (status == KINGLET_ERR_TOO_SMALL || !failed(env, status, &err)) {
        float *direction = malloc((count + 1) * sizeof *direction);
        if (!none(env, direction) && !failed(env, kinglet_session_embed(s, ids, n, direction, count, &count, &err), &err))
            out = floats(env, direction, count);
        free(direction);
    }
    (*env)->ReleaseIntArrayElements(env, tokens, ids, JNI_ABORT);
    return out;
}

NATIVE(void, sessionSave)(JNIEnv *env, jclass jni, jlong session, jbyteArray path) {
    kinglet_error err;
    jbyte *p = take_bytes(env, path);
    (void)jni;
    kinglet_status status = kinglet_session_save(POINTER(session, session), (const char *)p, &err);
    drop_bytes(env, path, p);
    failed(env, status, &err);
}

NATIVE(void, sessionLoad)(JNIEnv *env, jclass jni, jlong session, jbyteArray path) {
    kinglet_error err;
    jbyte *p = take_bytes(env, path);
    (void)jni;
    kinglet_status status = kinglet_session_load(POINTER(session, session), (const char *)p, &err);
    drop_bytes(env, path, p);
    failed(env, status, &err);
}

NATIVE(void, sessionCancel)(JNIEnv *env, jclass jni, jlong session) {
    (void)env, (void)jni;
    kinglet_session_cancel(POINTER(session, session));
}

/* ---------------------------------------------------------------------------------------------- Generation -- */

NATIVE(jlong, generate)(JNIEnv *env, jclass jni, jlong session, jbyteArray request) {
    kinglet_error err;
    kinglet_generation *out = NULL;
    jbyte *r = take_bytes(env, request);
    (void)jni;
    kinglet_status status = kinglet_generate(POINTER(session, session), (const char *)r, &out, &err);
    drop_bytes(env, request, r);
    return pointer(env, status, &err, out);
}

NATIVE(jobject, generationNext)(JNIEnv *env, jclass jni, jlong generation, jlongArray counts, jdoubleArray times) {
    kinglet_error err;
    kinglet_event e = {.struct_size = sizeof e};
    (void)jni;
    kinglet_status status = kinglet_generation_next(POINTER(generation, generation), &e, &err);
    if (failed(env, status, &err)) return NULL;
    if (status == KINGLET_DONE) {
        const jlong done = status;
        (*env)->SetLongArrayRegion(env, counts, 0, 1, &done);
        return NULL;
    }
    const jlong c[] = {status,          e.kind,           e.end_reason, e.prompt_tokens, e.reused_tokens,
                       e.prefilled_tokens, e.output_tokens};
    const jdouble t[] = {e.prefill_ms, e.decode_ms};
    (*env)->SetLongArrayRegion(env, counts, 0, 7, c);
    (*env)->SetDoubleArrayRegion(env, times, 0, 2, t);
    if (e.kind != KINGLET_EVENT_TEXT) return NULL;
    jbyteArray text = bytes(env, e.text, e.text_len);
    jintArray tokens = text ? ints(env, e.tokens, e.n_tokens) : NULL;
    return tokens ? (*env)->NewObject(env, piece_class, new_piece, text, tokens) : NULL;
}

NATIVE(jbyteArray, generationMessageJson)(JNIEnv *env, jclass jni, jlong generation) {
    kinglet_error err;
    char *out = NULL;
    (void)jni;
    kinglet_status status = kinglet_generation_message_json(POINTER(generation, generation), &out, &err);
    return string(env, status, &err, out);
}

NATIVE(void, generationCancel)(JNIEnv *env, jclass jni, jlong generation) {
    (void)env, (void)jni;
    kinglet_generation_cancel(POINTER(generation, generation));
}

NATIVE(void, generationFree)(JNIEnv *env, jclass jni, jlong generation) {
    (void)env, (void)jni;
    kinglet_generation_free(POINTER(generation, generation));
}

/* ------------------------------------------------------------------------------------------------ Adapters -- */

NATIVE(jlong, adapterOpen)(JNIEnv *env, jclass jni, jlong model, jbyteArray path) {
    kinglet_error err;
    kinglet_adapter *out = NULL;
    jbyte *p = take_bytes(env, path);
    (void)jni;
    kinglet_status status = kinglet_adapter_open(POINTER(model, model), (const char *)p, &out, &err);
    drop_bytes(env, path, p);
    return pointer(env, status, &err, out);
}

NATIVE(void, adapterFree)(JNIEnv *env, jclass jni, jlong adapter) {
    (void)env, (void)jni;
    kinglet_adapter_free(POINTER(adapter, adapter));
}

NATIVE(jbyteArray, adapterInfoJson)(JNIEnv *env, jclass jni, jlong adapter) {
    kinglet_error err;
    char *out = NULL;
    (void)jni;
    kinglet_status status = kinglet_adapter_info_json(POINTER(adapter, adapter), &out, &err);
    return string(env, status, &err, out);
}

NATIVE(void, adapterMerge)
(JNIEnv *env, jclass jni, jlong model, jlongArray pointers, jfloatArray scales, jbyteArray path, jbyteArray quant) {
    kinglet_error err;
    adapters all = take_adapters(env, pointers, scales);
    jbyte *p = take_bytes(env, path), *q = take_bytes(env, quant);
    (void)jni;
    if (!lacks(env, &all))
        failed(env,
               kinglet_adapter_merge(POINTER(model, model), all.adapters, all.scales, all.count, (const char *)p,
                                     (const char *)q, &err),
               &err);
    drop_bytes(env, path, p);
    drop_bytes(env, quant, q);
    drop_adapters(env, &all, pointers, scales);
}

/* ------------------------------------------------------------------------------------------------ Training -- */

NATIVE(jlong, trainerCreate)(JNIEnv *env, jclass jni, jlong model, jbyteArray config) {
    kinglet_error err;
    kinglet_trainer *out = NULL;
    jbyte *c = take_bytes(env, config);
    (void)jni;
    kinglet_status status = kinglet_trainer_create(POINTER(model, model), (const char *)c, &out, &err);
    drop_bytes(env, config, c);
    return pointer(env, status, &err, out);
}

NATIVE(void, trainerFree)(JNIEnv *env, jclass jni, jlong trainer) {
    (void)env, (void)jni;
    kinglet_trainer_free(POINTER(trainer, trainer));
}

NATIVE(jbyteArray, trainerInfoJson)(JNIEnv *env, jclass jni, jlong trainer) {
    kinglet_error err;
    char *out = NULL;
    (void)jni;
    kinglet_status status = kinglet_trainer_info_json(POINTER(trainer, trainer), &out, &err);
    return string(env, status, &err, out);
}

NATIVE(jbyteArray, trainerStep)(JNIEnv *env, jclass jni, jlong trainer, jlongArray counts, jdoubleArray numbers) {
    kinglet_error err;
    kinglet_train_report r = {.struct_size = sizeof r};
    (void)jni;
    kinglet_status status = kinglet_trainer_step(POINTER(trainer, trainer), &r, &err);
    if (failed(env, status, &err)) return NULL;
    const jlong c[] = {status, r.kind, (jlong)r.step, (jlong)r.steps};
    const jdouble n[] = {r.loss,           r.learning_rate,    r.gradient_norm, r.tokens_per_second, r.validation_loss,
                         r.reward_accuracy, r.reward_margin};
    (*env)->SetLongArrayRegion(env, counts, 0, 4, c);
    (*env)->SetDoubleArrayRegion(env, numbers, 0, 7, n);
    return r.note ? bytes(env, r.note, strlen(r.note)) : NULL;
}

NATIVE(void, trainerSave)(JNIEnv *env, jclass jni, jlong trainer) {
    kinglet_error err;
    (void)jni;
    failed(env, kinglet_trainer_save(POINTER(trainer, trainer), &err), &err);
}

NATIVE(jlong, trainerAdapter)(JNIEnv *env, jclass jni, jlong trainer) {
    kinglet_error err;
    kinglet_adapter *out = NULL;
    (void)jni;
    kinglet_status status = kinglet_trainer_adapter(POINTER(trainer, trainer), &out, &err);
    return pointer(env, status, &err, out);
}

NATIVE(jbyteArray, trainerFinish)(JNIEnv *env, jclass jni, jlong trainer) {
    kinglet_error err;
    char *out = NULL;
    (void)jni;
    kinglet_status status = kinglet_trainer_finish(POINTER(trainer, trainer), &out, &err);
    return string(env, status, &err, out);
}

NATIVE(void, trainerCancel)(JNIEnv *env, jclass jni, jlong trainer) {
    (void)env, (void)jni;
    kinglet_trainer_cancel(POINTER(trainer, trainer));
}
