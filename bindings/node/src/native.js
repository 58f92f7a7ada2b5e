/**
 * The shared library behind the package: found, loaded, its errors turned into exceptions.
 *
 * The C header is the one source of declarations. In an npm package, header and library lie in its folder; in a checkout the
 * header is taken from `ffi/include`. `KINGLET_LIBRARY` names another library.
 */
import { existsSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import koffi from 'koffi';

const HEADERS = ['../kinglet.h', '../../../ffi/include/kinglet.h'];
const NAMES = { darwin: 'libkinglet.dylib', win32: 'kinglet.dll' };

// Calls run on stacks of koffi's, which are smaller than those of threads where they are asynchronous.
koffi.config({ async_stack_size: 4 << 20, sync_stack_size: 4 << 20 });

function local(path) {
  return fileURLToPath(new URL(path, import.meta.url));
}

/** The header without comments and directives. */
function declarations() {
  const path = HEADERS.map(local).find(existsSync);
  if (!path) throw new Error(`kinglet.h is in none of ${HEADERS.map(local).join(', ')}; install the package again`);
  return readFileSync(path, 'utf8')
    .replace(/\/\*.*?\*\//gs, '')
    .replace(/#ifdef __cplusplus.*?#endif/gs, '')
    .replace(/^\s*#.*$/gm, '');
}

/** The path, or the name, of the shared library. */
function library() {
  if (process.env.KINGLET_LIBRARY) return process.env.KINGLET_LIBRARY;
  const name = NAMES[process.platform] ?? 'libkinglet.so.1';
  const own = local(`../native/${process.platform}-${process.arch}/${name}`);
  return existsSync(own) ? own : name;
}

function load() {
  try {
    return koffi.load(library());
  } catch (error) {
    throw new Error(`${error.message}; set KINGLET_LIBRARY to the path of libkinglet`, { cause: error });
  }
}

const shared = load();

/** A parameter as koffi wants it: what the library writes is marked, and bytes are bytes. */
function parameter(text) {
  const constant = /\bconst\b/.test(text);
  const [, type, stars, name] = text.replace(/\bconst\b/g, '').match(/^\s*(\w+)([*\s]+)(\w+)\s*$/);
  const depth = stars.replace(/\s/g, '').length;
  if (type === 'char' && depth === 2) return `_Out_ kinglet_text *${name}`;
  if (type.startsWith('kinglet_') && depth === 2 && !constant) return `_Out_ ${type} **${name}`;
  if (type === 'kinglet_error' || (['size_t', 'uint64_t'].includes(type) && depth === 1)) return `_Out_ ${type} *${name}`;
  if (structs[type] && depth === 1 && !constant) return `_Inout_ ${type} *${name}`;
  // A text with a length beside it may hold a NUL; an array is filled in place.
  if (type === 'char' && (name === 'text' || !constant)) return `uint8_t *${name}`;
  return `${type} ${'*'.repeat(depth)}${name}`;
}

/** A struct of the header: its fields, a text with a length beside it as a pointer. */
function fields(body) {
  const found = {};
  for (const [, type, star, names] of body.matchAll(/(?:const\s+)?(\w+)\s+(\*?)([^;]+);/g)) {
    for (const name of names.split(',').map((word) => word.trim())) {
      const [, bare, length] = name.match(/^(\w+)(?:\[(\d+)\])?$/);
      const pointer = star && (type !== 'char' || body.includes(`${bare}_len`));
      found[bare] = length ? koffi.array(type, Number(length)) : pointer ? 'void *' : `${type} ${star}`.trim();
    }
  }
  return found;
}

const structs = {};
/** The numbers of the header. */
export const constants = {};
/** The functions of the header. */
export const lib = {};

// Numbers and types, then the functions that use them.
{
  const text = declarations();
  koffi.alias('kinglet_status', 'int32_t');
  for (const [, body] of text.matchAll(/enum\s*\{(.*?)\}/gs))
    for (const [, name, value] of body.matchAll(/(\w+)\s*=\s*(-?\d+)/g)) constants[name] = Number(value);
  for (const [, name] of text.matchAll(/\(\*(\w+)\)\(/g)) koffi.alias(name, 'void *');
  for (const [, name, body] of text.matchAll(/struct (\w+)\s*\{(.*?)\}/gs)) structs[name] = koffi.struct(name, fields(body));
  for (const [, name] of text.matchAll(/typedef struct (\w+) \1;/g)) structs[name] ?? koffi.opaque(name);
  const free = shared.func('void kinglet_string_free(void *string)');
  koffi.disposable('kinglet_text', 'str', free);
  const plain = text.replace(/typedef.*?;/gs, (t) => (t.includes('{') ? t : '')).replace(/\{.*?\}/gs, '');
  for (const [, result, name, list] of plain.matchAll(/([\w][\w\s]*?[\s*]+)(kinglet_\w+)\(([^()]*)\);/g)) {
    const parameters = list.trim() === 'void' ? '' : list.split(',').map(parameter).join(', ');
    lib[name] = shared.func(`${result.replace(/\s+/g, ' ')}${name}(${parameters})`);
  }
}

const STATUS = Object.fromEntries(
  Object.entries(constants).filter(([name]) => name.startsWith('KINGLET_ERR_')).map(([name, code]) => [code, name]),
);

/** What the library says went wrong. */
export class KingletError extends Error {
  constructor(code, message) {
    super(message);
    this.name = 'KingletError';
    this.code = code;
    this.status = (STATUS[code] ?? 'KINGLET_ERR_INTERNAL').slice('KINGLET_ERR_'.length);
  }
}

function checked(status, error) {
  if (status < 0) throw new KingletError(status, error.message);
  return status;
}

/** Calls `function_` with a place for its error behind `parameters`; a status below 0 is thrown. */
export function call(function_, ...parameters) {
  const error = {};
  return checked(function_(...parameters, error), error);
}

/** What calls on other threads use. The library gets the memory of arrays as it is, which nobody else keeps alive. */
const used = new Set();

/** As `call`, on another thread. */
export function callAsync(function_, ...parameters) {
  const error = {};
  used.add(parameters);
  return new Promise((resolve, reject) => {
    function_.async(...parameters, error, (failure, status) => {
      used.delete(parameters);
      try {
        if (failure) throw failure;
        resolve(checked(status, error));
      } catch (reason) {
        reject(reason);
      }
    });
  });
}

/** The text that `function_` hands out, or null. */
export function text(function_, ...parameters) {
  const out = [null];
  call(function_, ...parameters, out);
  return out[0];
}

/** The array of `Type` that `function_` fills when asked a second time. */
export function array(Type, function_, ...parameters) {
  const [count, error] = [[0], {}];
  const status = function_(...parameters, null, 0, count, error);
  if (status !== constants.KINGLET_ERR_TOO_SMALL) checked(status, error);
  const out = new Type(Number(count[0]));
  if (out.length > 0) call(function_, ...parameters, out, out.length, count);
  return out;
}

/** A struct of the library's with its size and `values` set. */
export function struct(name, values = {}) {
  const zeros = Object.entries(structs[name].members).map(([field, { type }]) => [
    field,
    type.primitive === 'Pointer' || type.primitive === 'String' ? null : 0,
  ]);
  return { ...Object.fromEntries(zeros), struct_size: koffi.sizeof(structs[name]), ...values };
}

/** `length` bytes of UTF-8 at a pointer. */
export function decodeText(pointer, length) {
  return length ? koffi.decode.string(pointer, length) : '';
}

/** `length` numbers at a pointer. */
export function decodeTokens(pointer, length) {
  return length ? Array.from(koffi.decode(pointer, 'int32_t', length)) : [];
}

const forgotten = new FinalizationRegistry(({ free, pointer }) => free(pointer));

/** Something that lives in the library: freed by `close`, or when JavaScript forgets it, but not before its calls are over. */
export class Handle {
  #pointer;
  #free;
  #running = 0;

  constructor(pointer, free) {
    this.#pointer = pointer;
    this.#free = free;
    forgotten.register(this, { free, pointer }, this);
  }

  get pointer() {
    if (this.#pointer === null) throw new KingletError(constants.KINGLET_ERR_ARG, 'this object is closed');
    return this.#pointer;
  }

  /** Calls on another thread with the object first. */
  run(function_, ...parameters) {
    return holding([this], (pointer) => callAsync(function_, pointer, ...parameters));
  }

  /** Takes part in a call on another thread; the object is not freed before `release`. */
  hold() {
    const pointer = this.pointer;
    this.#running++;
    return pointer;
  }

  release(pointer) {
    this.#running--;
    if (this.#pointer === null && this.#running === 0) this.#free(pointer);
  }

  /** Asks a running call to stop; objects that can do so say how. */
  cancel() {}

  close() {
    if (this.#pointer === null) return;
    if (this.#running > 0) this.cancel();
    const pointer = this.#pointer;
    this.#pointer = null;
    forgotten.unregister(this);
    if (this.#running === 0) this.#free(pointer);
  }
}

if (Symbol.dispose) Object.defineProperty(Handle.prototype, Symbol.dispose, { value: Handle.prototype.close });

/** Awaits `work`, which gets the pointers of `handles`, and keeps these alive until it is over. */
export async function holding(handles, work) {
  const held = [];
  try {
    for (const handle of handles) held.push([handle, handle.hold()]);
    return await work(...held.map(([, pointer]) => pointer));
  } finally {
    for (const [handle, pointer] of held) handle.release(pointer);
  }
}

/** The object that `function_` hands out. */
export function make(function_, ...parameters) {
  const out = [null];
  call(function_, ...parameters, out);
  return out[0];
}

/** As `make`, on another thread. */
export async function makeAsync(function_, ...parameters) {
  const out = [null];
  await callAsync(function_, ...parameters, out);
  return out[0];
}

/** Awaits `work`, which `cancel` stops when `signal` is aborted: then the signal's reason is thrown. */
export async function abortable(signal, cancel, work) {
  signal?.throwIfAborted();
  signal?.addEventListener('abort', cancel, { once: true });
  try {
    return await work();
  } catch (error) {
    if (error?.code === constants.KINGLET_ERR_CANCELLED) signal?.throwIfAborted();
    throw error;
  } finally {
    signal?.removeEventListener('abort', cancel);
  }
}
