/**
 * Language models on your own device. Thin over `kinglet.h`; `index.d.ts` describes every member.
 *
 * What takes time is a promise and runs on a thread of Node's pool; what does not is an ordinary function.
 */
import {
  Handle, KingletError, abortable, array, call, callAsync, constants, decodeText, decodeTokens, holding, lib, make,
  makeAsync, struct, text,
} from './native.js';

export { KingletError };

const KV = { F16: constants.KINGLET_KV_F16, F32: constants.KINGLET_KV_F32, Q8_0: constants.KINGLET_KV_Q8_0 };
const ENDS = {
  [constants.KINGLET_END_OF_TEXT]: 'endOfText',
  [constants.KINGLET_END_LENGTH]: 'length',
  [constants.KINGLET_END_STOP]: 'stop',
  [constants.KINGLET_END_CONTEXT_FULL]: 'contextFull',
  [constants.KINGLET_END_CANCELLED]: 'cancelled',
};

const camel = (name) => name.replace(/_(\w)/g, (_, letter) => letter.toUpperCase());

/** The numbers of a struct of the library's under JavaScript's names. */
function numbers(value, names) {
  return Object.fromEntries(names.map((name) => [camel(name), Number(value[name])]));
}

const MEMORY = ['weights', 'kv_cache', 'activations', 'scratch', 'adapters', 'total', 'mapped'];
const COUNTS = ['prompt_tokens', 'reused_tokens', 'prefilled_tokens', 'output_tokens', 'prefill_ms', 'decode_ms'];
const REPORT = [
  'step', 'steps', 'loss', 'learning_rate', 'gradient_norm', 'tokens_per_second', 'validation_loss', 'reward_accuracy',
  'reward_margin',
];

function modelOptions({
  backend = 'auto', threads = 0, memoryBudget = 0, prefixCache = 0, gpuLayers = 0, gpuMemory = 0, gpuImport = false,
  tuningFolder = null, tuneInt8 = false, validate = false, copy = false,
} = {}) {
  const flags = (validate ? constants.KINGLET_MODEL_VALIDATE : 0) | (copy ? constants.KINGLET_MODEL_COPY : 0);
  const budgets = { memory_budget: memoryBudget, prefix_cache: prefixCache };
  const tuning = tuneInt8 ? constants.KINGLET_TUNE_INT8 : 0;
  const gpu = { gpu_layers: gpuLayers, gpu_memory: gpuMemory, gpu_import: gpuImport ? 1 : 0 };
  return struct('kinglet_model_options', {
    backend, threads, flags, ...budgets, ...gpu, tuning_folder: tuningFolder, tuning,
  });
}

function sessionOptions({ context = 0, kv, chunk = 0 } = {}) {
  if (kv !== undefined && !(kv in KV))
    throw new KingletError(constants.KINGLET_ERR_ARG, `kv is ${kv}; it must be F16, F32 or Q8_0`);
  return struct('kinglet_session_options', { context_tokens: context, kv_type: kv ? KV[kv] : 0, chunk_tokens: chunk });
}

/** Adapters, each alone or with its scale, as two arrays. */
function scaled(adapters) {
  const pairs = [...adapters].map((one) => (Array.isArray(one) ? one : [one, 1]));
  return [pairs.map(([adapter]) => adapter), Float32Array.from(pairs, ([, scale]) => scale)];
}

export function version() {
  return lib.kinglet_version();
}

export function build() {
  return JSON.parse(text(lib.kinglet_build_json));
}

export function devices() {
  return JSON.parse(text(lib.kinglet_devices_json));
}

export function estimate(path, options = {}) {
  const memory = struct('kinglet_memory');
  call(lib.kinglet_model_estimate, path, modelOptions(options), sessionOptions(options), memory);
  return numbers(memory, MEMORY);
}

export class Model extends Handle {
  static async open(source, options) {
    const given = typeof source === 'string' ? modelOptions(options) : modelOptions({ ...options, copy: true });
    const pointer = typeof source === 'string'
      ? makeAsync(lib.kinglet_model_open, source, given)
      : makeAsync(lib.kinglet_model_open_memory, source, source.byteLength, null, null, given);
    return new Model(await pointer, lib.kinglet_model_free);
  }

  get info() {
    return JSON.parse(text(lib.kinglet_model_info_json, this.pointer));
  }

  get chatTemplate() {
    return text(lib.kinglet_model_chat_template, this.pointer);
  }

  tokenize(content, { special = false, control = false } = {}) {
    const bytes = Buffer.from(content);
    const flags = (special ? constants.KINGLET_TOKENIZE_SPECIAL : 0) | (control ? constants.KINGLET_TOKENIZE_CONTROL : 0);
    return Array.from(array(Int32Array, lib.kinglet_tokenize, this.pointer, bytes, bytes.length, flags));
  }

  detokenize(tokens, { control = false } = {}) {
    const flags = control ? constants.KINGLET_DETOKENIZE_CONTROL : 0;
    const bytes = array(Uint8Array, lib.kinglet_detokenize, this.pointer, Int32Array.from(tokens), tokens.length, flags);
    return Buffer.from(bytes.buffer).toString();
  }

  tokenBytes(token, { control = false } = {}) {
    const flags = control ? constants.KINGLET_DETOKENIZE_CONTROL : 0;
    return array(Uint8Array, lib.kinglet_token_bytes, this.pointer, token, flags);
  }

  trim() {
    const freed = [0];
    call(lib.kinglet_model_trim, this.pointer, freed);
    return Number(freed[0]);
  }

  async suspend() {
    await this.run(lib.kinglet_model_suspend);
  }

  resume() {
    call(lib.kinglet_model_resume, this.pointer);
  }

  async session(options) {
    const given = sessionOptions(options);
    const pointer = await holding([this], (model) => makeAsync(lib.kinglet_session_create, model, given));
    return new Session(pointer, lib.kinglet_session_free);
  }

  async adapter(path) {
    const pointer = await holding([this], (model) => makeAsync(lib.kinglet_adapter_open, model, path));
    return new Adapter(pointer, lib.kinglet_adapter_free);
  }

  async merge(adapters, path, quant = null) {
    const [handles, scales] = scaled(adapters);
    await holding([this, ...handles], (model, ...pointers) =>
      callAsync(lib.kinglet_adapter_merge, model, pointers, scales, pointers.length, path, quant));
  }

  async train(data, output, { signal, ...config } = {}) {
    const request = JSON.stringify({ data, output, ...config });
    const pointer = await holding([this], (model) => makeAsync(lib.kinglet_trainer_create, model, request));
    return new Trainer(pointer, signal);
  }
}

export class Adapter extends Handle {
  get info() {
    return JSON.parse(text(lib.kinglet_adapter_info_json, this.pointer));
  }
}

export class Session extends Handle {
  get length() {
    const count = [0];
    call(lib.kinglet_session_token_count, this.pointer, count);
    return Number(count[0]);
  }

  get memory() {
    const memory = struct('kinglet_memory');
    call(lib.kinglet_session_memory, this.pointer, memory);
    return numbers(memory, MEMORY);
  }

  chat(messages, request) {
    return this.generate({ messages, ...request });
  }

  complete(prompt, request) {
    return this.generate({ prompt, ...request });
  }

  generate({ signal, ...request }) {
    signal?.throwIfAborted();
    return new Generation(make(lib.kinglet_generate, this.pointer, JSON.stringify(request)), signal);
  }

  async feed(tokens, { signal } = {}) {
    await abortable(signal, () => this.cancel(), () =>
      this.run(lib.kinglet_session_feed, Int32Array.from(tokens), tokens.length));
  }

  logits() {
    return array(Float32Array, lib.kinglet_session_logits, this.pointer);
  }

  async score(tokens, { signal } = {}) {
    const logprobs = new Float32Array(Math.max(tokens.length - 1, 0));
    await abortable(signal, () => this.cancel(), () =>
      this.run(lib.kinglet_session_score, Int32Array.from(tokens), tokens.length, logprobs, logprobs.length));
    return logprobs;
  }

  async embed(tokens, { signal } = {}) {
    const count = [0];
    const ids = Int32Array.from(tokens);
    // Asks for the length first, which computes nothing.
    const failed = await this.run(lib.kinglet_session_embed, ids, ids.length, null, 0, count).catch((error) => error);
    if (failed.code !== constants.KINGLET_ERR_TOO_SMALL) throw failed;
    const out = new Float32Array(Number(count[0]));
    await abortable(signal, () => this.cancel(), () =>
      this.run(lib.kinglet_session_embed, ids, ids.length, out, out.length, count));
    return out;
  }

  async save(path) {
    await this.run(lib.kinglet_session_save, path);
  }

  async load(path) {
    await this.run(lib.kinglet_session_load, path);
  }

  fork() {
    return new Session(make(lib.kinglet_session_fork, this.pointer), lib.kinglet_session_free);
  }

  reset() {
    call(lib.kinglet_session_reset, this.pointer);
  }

  rewind(length) {
    call(lib.kinglet_session_rewind, this.pointer, length);
  }

  setAdapters(adapters = []) {
    const [handles, scales] = scaled(adapters);
    const pointers = handles.map((adapter) => adapter.pointer);
    call(lib.kinglet_session_set_adapters, this.pointer, pointers, scales, pointers.length);
  }

  cancel() {
    lib.kinglet_session_cancel(this.pointer);
  }
}

export class Generation extends Handle {
  #event = struct('kinglet_event');
  #signal;
  #abort = () => this.cancel();
  end = null;

  constructor(pointer, signal) {
    super(pointer, lib.kinglet_generation_free);
    Object.assign(this, numbers(this.#event, COUNTS));
    this.#signal = signal;
    signal?.addEventListener('abort', this.#abort, { once: true });
  }

  async next() {
    // What an event points to lives as long as the generation.
    const piece = await holding([this], (pointer) => this.#pull(pointer));
    if (!piece && this.end === 'cancelled') this.#signal?.throwIfAborted();
    return { done: !piece, value: piece };
  }

  async #pull(pointer) {
    const event = this.#event;
    while ((await callAsync(lib.kinglet_generation_next, pointer, event)) === constants.KINGLET_OK) {
      Object.assign(this, numbers(event, COUNTS));
      if (event.kind === constants.KINGLET_EVENT_TEXT)
        return { text: decodeText(event.text, event.text_len), tokens: decodeTokens(event.tokens, event.n_tokens) };
      if (event.kind === constants.KINGLET_EVENT_END) this.end = ENDS[event.end_reason];
    }
    return undefined;
  }

  async return() {
    this.close();
    return { done: true, value: undefined };
  }

  [Symbol.asyncIterator]() {
    return this;
  }

  async read() {
    let whole = '';
    for await (const piece of this) whole += piece.text;
    return whole;
  }

  get message() {
    return JSON.parse(text(lib.kinglet_generation_message_json, this.pointer));
  }

  cancel() {
    lib.kinglet_generation_cancel(this.pointer);
  }

  close() {
    this.#signal?.removeEventListener('abort', this.#abort);
    super.close();
  }
}

export class Trainer extends Handle {
  #report = struct('kinglet_train_report');
  #signal;

  constructor(pointer, signal) {
    super(pointer, lib.kinglet_trainer_free);
    this.#signal = signal;
  }

  async next() {
    const report = this.#report;
    const step = () => this.run(lib.kinglet_trainer_step, report);
    if ((await abortable(this.#signal, () => this.cancel(), step)) === constants.KINGLET_DONE)
      return { done: true, value: undefined };
    const rolledBack = report.kind === constants.KINGLET_TRAIN_ROLLED_BACK;
    return { done: false, value: { rolledBack, note: report.note, ...numbers(report, REPORT) } };
  }

  [Symbol.asyncIterator]() {
    return this;
  }

  get info() {
    return JSON.parse(text(lib.kinglet_trainer_info_json, this.pointer));
  }

  async save() {
    await this.run(lib.kinglet_trainer_save);
  }

  adapter() {
    return new Adapter(make(lib.kinglet_trainer_adapter, this.pointer), lib.kinglet_adapter_free);
  }

  async finish() {
    return JSON.parse(await holding([this], (trainer) => makeAsync(lib.kinglet_trainer_finish, trainer)));
  }

  cancel() {
    lib.kinglet_trainer_cancel(this.pointer);
  }
}
