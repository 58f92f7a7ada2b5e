/**
 * Language models on your own device: chat, and teach them.
 *
 * Objects free themselves when JavaScript forgets them, in any order; `close` frees them at once. A model may be used by
 * many sessions together; a session, a generation and a trainer take one call at a time, and a second one fails with the
 * status `BUSY`. Everything throws `KingletError`; where a signal was aborted, its reason is thrown.
 */

/** What the library says went wrong. */
export class KingletError extends Error {
  /** A `KINGLET_ERR_*` number. */
  readonly code: number;
  /** Its name without `KINGLET_ERR_`. */
  readonly status:
    | 'ARG' | 'IO' | 'FORMAT' | 'UNSUPPORTED' | 'MEMORY' | 'CONTEXT_FULL' | 'BUSY' | 'CANCELLED' | 'DEVICE_LOST'
    | 'SUSPENDED' | 'TOO_SMALL' | 'ABI' | 'NUMERIC' | 'INTERNAL';
}

/** Something that lives in the library. */
declare class Handle {
  protected constructor();
  /** Frees the object now, or when the call that uses it is over; it cannot be used any more. */
  close(): void;
  [Symbol.dispose](): void;
}

/** Bytes that a model with one session takes. */
export interface Memory {
  weights: number;
  kvCache: number;
  activations: number;
  scratch: number;
  adapters: number;
  total: number;
  /** Of the weights what is read in place from the mapped file; the rest of the total is allocated. */
  mapped: number;
}

export interface ModelOptions {
  /** `auto` (the best GPU, else the CPU), `cpu`, `gpu` or `gpu:1`. */
  backend?: string;
  /** Of each session and trainer; 0: one per core. */
  threads?: number;
  /** Most bytes that the file and one session, or trainer, take together; 0: no limit. */
  memoryBudget?: number;
  /** Most bytes for prompts that were read, so that sessions that begin alike share the work; 0: none. */
  prefixCache?: number;
  /** How many of the last layers a GPU runs, while the CPU runs the others; 0: all, or as many as its memory holds. */
  gpuLayers?: number;
  /** Most bytes of a GPU's memory that a session takes: it gets as many layers as that holds; 0: no limit. */
  gpuMemory?: number;
  /** Read the weights on a GPU from the mapped file, without a copy, where its driver allows that; for one in the processor. */
  gpuImport?: boolean;
  /** Where the times of a GPU's kernels are kept, which are timed once then, and the quickest taken; none are timed without. */
  tuningFolder?: string;
  /** Let products of eight bits compete too: quicker for some, but rounded more. With a folder only. */
  tuneInt8?: boolean;
  /** Read all weights on opening, and refuse NaN and infinity. */
  validate?: boolean;
  /** Read the file into memory instead of mapping it: for files that others change. */
  copy?: boolean;
}

export interface SessionOptions {
  /** Tokens that the window holds; 0: as many as the model was trained for. */
  context?: number;
  /** How keys and values are kept. */
  kv?: 'F16' | 'F32' | 'Q8_0';
  /** Most tokens of a prompt that are computed at once; 0: 512. */
  chunk?: number;
}

/** A message of a conversation, in the shape of the OpenAI API. */
export interface Message {
  role: string;
  content?: string | { type: 'text'; text: string }[] | null;
  tool_calls?: object[];
  name?: string;
  tool_call_id?: string;
  reasoning_content?: string;
}

/** The keys of `kinglet_generate` in `kinglet.h`. */
export interface Request {
  /** Tools on offer, as the OpenAI API has them. */
  tools?: object[];
  /** Whether one of them is called. */
  tool_choice?: 'auto' | 'required' | 'none' | { type: 'function'; function: { name: string } };
  /** What the answer is to be. */
  response_format?: { type: 'text' | 'json_object' } | { type: 'json_schema'; json_schema: { schema: object } };
  /** In place of that: a grammar in llguidance's dialect of Lark. */
  grammar?: string;
  /** Further variables of the chat template. */
  template?: Record<string, unknown>;
  max_tokens?: number;
  /** Texts that end the answer. */
  stop?: string | string[];
  ignore_end?: boolean;
  special?: boolean;
  /** `temperature`, `top_k`, `seed` and more. */
  sampling?: Record<string, unknown>;
}

export interface Abortable {
  /** Stops the work between two operations. */
  signal?: AbortSignal;
}

/** A piece of an answer: whole characters, and the tokens behind them. */
export interface Piece {
  text: string;
  tokens: number[];
}

/** What a training step did. Numbers that were not measured are NaN. */
export interface Report {
  /** A step went wrong: an earlier state is in place, with half the learning rate. */
  rolledBack: boolean;
  step: number;
  steps: number;
  loss: number;
  learningRate: number;
  gradientNorm: number;
  tokensPerSecond: number;
  validationLoss: number;
  rewardAccuracy: number;
  rewardMargin: number;
  note: string | null;
}

/** The version of the library. */
export function version(): string;
/** How the library was built and what it uses of this processor. */
export function build(): Record<string, unknown>;
/** The devices that models can run on; `backend` of each is what `Model.open` takes. */
export function devices(): { backend: string; name: string; unfit: string | null; [more: string]: unknown }[];
/** What opening a model and one session with a full window would take. Nothing is allocated. */
export function estimate(path: string, options?: ModelOptions & SessionOptions): Memory;

/** Weights with tokenizer and chat template. */
export class Model extends Handle {
  /** Opens the file at the path `source`, or the model in the bytes `source`, which are copied. */
  static open(source: string | Uint8Array, options?: ModelOptions): Promise<Model>;
  /** What the model is. */
  readonly info: Record<string, unknown>;
  /** Its chat template; null for a base model. */
  readonly chatTemplate: string | null;
  /** The tokens of a text; `special` adds BOS and EOS where the model wants them, `control` reads control tokens. */
  tokenize(content: string | Uint8Array, options?: { special?: boolean; control?: boolean }): number[];
  /** The text of tokens. */
  detokenize(tokens: ArrayLike<number>, options?: { control?: boolean }): string;
  /** The bytes of one token, which may be a part of a character. */
  tokenBytes(token: number, options?: { control?: boolean }): Uint8Array;
  /** Gives back memory that can be had again, and says how many bytes. */
  trim(): number;
  /** Lets nothing compute with the model until `resume`: what would fails with the status `SUSPENDED`. */
  suspend(): Promise<void>;
  /** Takes `suspend` back. */
  resume(): void;
  /** A conversation. */
  session(options?: SessionOptions): Promise<Session>;
  /** The LoRA adapter at `path`: a GGUF file, or a folder as PEFT writes it. */
  adapter(path: string): Promise<Adapter>;
  /** Writes a new model file with adapters inside; changed matrices get the type `quant`, or keep theirs. */
  merge(adapters: Iterable<Adapter | [Adapter, number]>, path: string, quant?: string | null): Promise<void>;
  /**
   * A training on the file or files `data`, which writes into the folder `output`. Settings are those of
   * `kinglet_trainer_create`: `rank`, `lr`, `steps`, `resume` and more.
   */
  train(data: string | string[], output: string, config?: Abortable & Record<string, unknown>): Promise<Trainer>;
}

/** Small trained corrections to a model. */
export class Adapter extends Handle {
  /** What the adapter is. */
  readonly info: Record<string, unknown>;
}

/** One conversation. */
export class Session extends Handle {
  /** How many tokens the window holds. */
  readonly length: number;
  /** What the session takes now. */
  readonly memory: Memory;
  /** Answers a conversation; what the session has read of it is not computed again. */
  chat(messages: Message[], request?: Request & Abortable): Generation;
  /** Continues a text, without the chat template. */
  complete(prompt: string, request?: Request & Abortable): Generation;
  /** Answers a request with either `messages` or `prompt` in it. */
  generate(request: Request & Abortable & { messages?: Message[]; prompt?: string }): Generation;
  /** Reads tokens. */
  feed(tokens: ArrayLike<number>, options?: Abortable): Promise<void>;
  /** The logits of what follows the tokens fed last. */
  logits(): Float32Array;
  /** Reads tokens and gives the log-probability of each but the first. */
  score(tokens: ArrayLike<number>, options?: Abortable): Promise<Float32Array>;
  /** What tokens mean together, as a direction of length 1; the window is left as it is. */
  embed(tokens: ArrayLike<number>, options?: Abortable): Promise<Float32Array>;
  /** Writes the window to a file. */
  save(path: string): Promise<void>;
  /** Takes the window from a file of `save`, in place of this one. */
  load(path: string): Promise<void>;
  /** A second session that has read the same tokens. */
  fork(): Session;
  /** Forgets all tokens. */
  reset(): void;
  /** Keeps the first `length` tokens. */
  rewind(length: number): void;
  /** Puts adapters in force, each with its scale, in place of those before. */
  setAdapters(adapters?: Iterable<Adapter | [Adapter, number]>): void;
  /** Stops `feed`, `score` or `embed`. */
  cancel(): void;
}

/**
 * An answer under way: its pieces, one after the other. Leaving a `for await` early closes it. When it has ended, `end` says
 * why.
 */
export class Generation extends Handle implements AsyncIterableIterator<Piece> {
  readonly end: 'endOfText' | 'length' | 'stop' | 'contextFull' | 'cancelled' | null;
  readonly promptTokens: number;
  readonly reusedTokens: number;
  readonly prefilledTokens: number;
  readonly outputTokens: number;
  readonly prefillMs: number;
  readonly decodeMs: number;
  next(): Promise<IteratorResult<Piece, undefined>>;
  return(): Promise<IteratorResult<Piece, undefined>>;
  [Symbol.asyncIterator](): this;
  /** The rest of the answer. */
  read(): Promise<string>;
  /** The answer so far as a message, with calls of tools told from text; it may go back into `chat`. */
  readonly message: Message;
  /** Ends the answer; the pieces end, and `end` is `cancelled`. */
  cancel(): void;
}

/** A training run: each step is taken when its report is asked for. */
export class Trainer extends Handle implements AsyncIterableIterator<Report> {
  /** What is ahead. */
  readonly info: Record<string, unknown>;
  next(): Promise<IteratorResult<Report, undefined>>;
  [Symbol.asyncIterator](): this;
  /** Writes a checkpoint into the output folder. */
  save(): Promise<void>;
  /** The adapter as it is after the steps so far. */
  adapter(): Adapter;
  /** Writes what was trained and a report into the output folder. */
  finish(): Promise<Record<string, unknown>>;
  /** Stops the step that is running, or else the next: it fails with the status `CANCELLED`. */
  cancel(): void;
}
