// Prints the most probable tokens behind a text, as `tests/c/tokens.c` does, from the library built for wasm32-unknown-unknown:
// no system beneath, so nothing is imported.   node tokens.mjs kinglet.wasm MODEL.gguf
import { readFileSync } from 'node:fs'

const [library, path] = process.argv.slice(2)
const { instance } = await WebAssembly.instantiate(readFileSync(library), {})
const kinglet = instance.exports
const memory = kinglet.memory

/// Memory of our own: pages that the library's allocator has not taken. Their address.
const reserve = (bytes) => memory.grow(Math.ceil(bytes / 65536)) * 65536
const view = () => new DataView(memory.buffer)

const text = (address) => {
  const bytes = new Uint8Array(memory.buffer, address)
  return new TextDecoder().decode(bytes.slice(0, bytes.indexOf(0)))
}

const page = reserve(65536)
const [out, error, options, event, strings] = [page, page + 16, page + 1024, page + 2048, page + 4096]

let free = strings
const string = (value) => {
  const bytes = new TextEncoder().encode(`${value}\0`)
  const at = free
  new Uint8Array(memory.buffer, at, bytes.length).set(bytes)
  free += bytes.length
  return at
}

/// The call's status; an error ends the program with its message.
const call = (name, ...args) => {
  const status = kinglet[name](...args, error)
  if (status < 0) throw new Error(`${name}: ${status}: ${text(error + 4)}`)
  return status
}
const made = () => view().getUint32(out, true)

const COPY = 2

/// Offsets of wasm32, as its C compilers lay structs out.
const MODEL_OPTIONS = { size: 40, flags: 4, backend: 8 }
const SESSION_OPTIONS = { size: 24, chunk: 16 }
const EVENT = { size: 64, tokens: 16, count: 20 }

/// A struct of zeros with its size and these fields.
const struct = (at, layout, fields = {}) => {
  new Uint8Array(memory.buffer, at, layout.size).fill(0)
  view().setUint32(at, layout.size, true)
  for (const [name, value] of Object.entries(fields)) view().setUint32(at + layout[name], value, true)
  return at
}

call('kinglet_build_json', out)
const build = JSON.parse(text(made()))
if (build.abi !== kinglet.kinglet_abi_version()) throw new Error('another ABI than it says')

// A copy too: by then the original may be gone.
const file = readFileSync(path)
const bytes = reserve(file.length)
new Uint8Array(memory.buffer, bytes, file.length).set(file)

const request = {
  prompt: 'what is on the table',
  max_tokens: 48,
  ignore_end: true,
  sampling: { temperature: 0 },
}

/// The tokens of an answer by a model opened with these flags, that reads at most `chunk` tokens at once.
const generate = (flags, request, chunk) => {
  struct(options, MODEL_OPTIONS, { flags, backend: string('auto') })
  call('kinglet_model_open_memory', bytes, file.length, 0, 0, options, out)
  const model = made()
  if (flags) new Uint8Array(memory.buffer, bytes, file.length).fill(0)
  call('kinglet_session_create', model, struct(options, SESSION_OPTIONS, { chunk }), out)
  const session = made()
  call('kinglet_generate', session, string(JSON.stringify(request)), out)
  const answer = made()
  const tokens = []
  struct(event, EVENT)
  while (call('kinglet_generation_next', answer, event) === 0) {
    const [at, count] = [EVENT.tokens, EVENT.count].map((field) => view().getUint32(event + field, true))
    for (let i = 0; i < count; i++) tokens.push(view().getInt32(at + 4 * i, true))
  }
  kinglet.kinglet_generation_free(answer)
  kinglet.kinglet_session_free(session)
  kinglet.kinglet_model_free(model)
  if (tokens.length !== request.max_tokens) throw new Error(`${tokens.length} tokens`)
  return tokens.join(' ')
}

// By the chat template, in many parts, drawn with a seed that the library finds: nothing of it needs a clock or a thread.
const messages = [{ role: 'user', content: 'What is on the table, and who has put it there? '.repeat(4) }]
generate(0, { messages, max_tokens: 4, ignore_end: true }, 4)

const given = generate(0, request, 512)
if (generate(COPY, request, 512) !== given) throw new Error('from a copy the model says something else')

// What needs a system says so.
for (const [name, ...args] of [
  ['kinglet_model_open', string('/model.gguf'), 0, out],
  ['kinglet_model_open_fd', 0, 0n, 0n, 0, out],
]) {
  if (kinglet[name](...args, error) >= 0) throw new Error(`${name} works, without files?`)
}
console.log(given)
