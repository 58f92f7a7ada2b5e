// What every binding must do, on the tiny model that `cargo run -p kinglet-ffi --example tiny` writes.
// node conformance.js VALUES MODEL LESSONS FOLDER, where VALUES is bindings/conformance.tsv
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import process from 'node:process';
import * as kinglet from 'kinglet';

const [table, path, lessons, folder] = process.argv.slice(2);
const lines = readFileSync(table, 'utf8').trimEnd().split('\n');
/** @type {Record<string, string>} */
const values = Object.fromEntries(lines.map((line) => line.split('\t')));

const openModel = () => kinglet.Model.open(path, { backend: 'cpu', threads: 2 });
const numbers = (/** @type {string} */ name) => values[name].split(' ').map(Number);
const request = (/** @type {string} */ name) => JSON.parse(values[name]);

/** @param {string} code @param {() => unknown} work */
async function fails(code, work, word = '') {
  await assert.rejects(async () => work(), (/** @type {any} */ error) => {
    assert(error instanceof kinglet.KingletError, String(error));
    assert.equal(error.code, Number(values[code]));
    assert(error.message.includes(word), error.message);
    return true;
  });
}

/** @param {kinglet.Generation} answer */
async function tokensOf(answer) {
  const tokens = [];
  for await (const piece of answer) tokens.push(...piece.tokens);
  return tokens;
}

/** @param {kinglet.Model} model */
function tokens(model) {
  const ids = model.tokenize(values.text);
  assert.deepEqual(ids, numbers('text_tokens'));
  assert.equal(model.detokenize(ids), values.text);
  assert.equal(Buffer.concat(ids.map((id) => model.tokenBytes(id))).toString(), values.text);
  assert.deepEqual(model.tokenize(''), []);
}

/** @param {kinglet.Model} model */
async function answers(model) {
  const session = await model.session();
  assert.deepEqual(await tokensOf(session.generate(request('greedy_request'))), numbers('greedy_tokens'));
  const prompt = Number(values.chat_prompt_tokens);
  for (const reused of [0, prompt - 1]) {
    const answer = session.generate(request('chat_request'));
    assert.deepEqual(await tokensOf(answer), numbers('chat_tokens'));
    assert.equal(answer.end, 'length');
    assert.equal(answer.promptTokens, prompt);
    assert(answer.reusedTokens >= reused);
  }
  session.reset();
  assert.equal(session.length, 0);
  const ids = numbers('text_tokens');
  await session.feed(ids.slice(0, -1));
  const fork = session.fork();
  await fork.feed(ids.slice(-1));
  await session.feed(ids.slice(-1));
  assert.deepEqual(fork.logits(), session.logits());
  session.rewind(1);
  assert.deepEqual([session.length, fork.length], [1, ids.length]);
  const scores = await fork.score(ids);
  assert(scores.length === ids.length - 1 && scores.every((score) => score < 0), String(scores));
}

/** @param {kinglet.Model} model */
async function splitUtf8(model) {
  const pieces = [];
  for await (const piece of (await model.session()).generate(request('emoji_request'))) pieces.push(piece.text);
  assert.equal(pieces.length, Number(values.emoji_pieces));
  assert.equal(pieces.join(''), values.emoji_text);
  assert(pieces.every((piece) => piece === '' || piece === values.emoji_text), 'a character was split');
}

/** @param {kinglet.Model} model */
async function structured(model) {
  const session = await model.session();
  for (let again = 0; again < 5; again++) {
    const answer = session.generate(request('schema_request'));
    const text = await answer.read();
    const { name, age, ...more } = JSON.parse(text);
    assert(name.length <= 10 && age >= 0 && age <= 99 && Object.keys(more).length === 0, text);
    assert.equal(answer.end, 'endOfText');
    assert.deepEqual(answer.message, { role: 'assistant', content: text });
  }
  await fails('unknown_key_code', () => session.generate(request('wrong_schema_request')), values.wrong_schema);
}

/** @param {kinglet.Model} model */
async function errors(model) {
  const session = await model.session();
  await fails('missing_model_code', () => kinglet.Model.open('/no/such/model'));
  const onCpu = await kinglet.Model.open(path, { backend: 'cpu', gpuLayers: 1, gpuImport: true });
  await fails('wrong_options_code', () => onCpu.session(), values.layers_on_cpu);
  onCpu.close();
  await fails('wrong_options_code', () => kinglet.Model.open(path, { tuningFolder: '' }), values.empty_folder);
  await fails('unknown_key_code', () => session.generate(request('unknown_key_request')), values.unknown_key);
  await fails('context_full_code', () => session.feed(new Array(100000).fill(1)));
  const answer = session.generate(request('greedy_request'));
  await fails('busy_code', () => session.reset());
  await answer.read();
  session.reset();
}

/** @param {kinglet.Model} model */
async function cancels(model) {
  const session = await model.session();
  const answer = session.generate(request('endless_request'));
  await answer.next();
  answer.cancel();
  await answer.read();
  assert.equal(answer.end, 'cancelled');

  const stop = new AbortController();
  const aborted = session.generate({ ...request('endless_request'), signal: stop.signal });
  await aborted.next();
  setTimeout(() => stop.abort(), 5);
  await assert.rejects(aborted.read(), { name: 'AbortError' });
  assert.throws(() => session.generate({ prompt: 'a', signal: stop.signal }), { name: 'AbortError' });

  // Closed in the middle of a call: freed when the call is over, and the session goes on.
  const closed = session.generate(request('endless_request'));
  const pending = closed.next();
  closed.close();
  await pending;
  assert.throws(() => closed.cancel(), kinglet.KingletError);
  // Leaving early gives the session back too.
  for await (const _ of session.generate(request('endless_request'))) break;
  session.reset();
}

/** @param {kinglet.Model} model */
async function windows(model) {
  const [session, other] = [await model.session(), await model.session()];
  const [prompt, window] = [numbers('text_tokens'), `${folder}.window`];
  const direction = await session.embed(prompt);
  assert(Math.abs(direction.reduce((sum, x) => sum + x * x, 0) - 1) < 1e-4 && session.length === 0);
  await session.feed(prompt);
  await session.save(window);
  await other.load(window);
  await fails('damaged_window_code', () => other.load(path));
  await session.feed(prompt.slice(-1));
  await other.feed(prompt.slice(-1));
  assert.deepEqual(session.logits(), other.logits());

  const answer = other.generate(request('greedy_request'));
  await model.suspend();
  await fails('suspended_code', () => answer.next());
  model.resume();
  assert.deepEqual(await tokensOf(answer), numbers('greedy_tokens'));
  assert(model.trim() > 0);
  assert.deepEqual(await tokensOf(other.generate(request('greedy_request'))), numbers('greedy_tokens'));
}

async function anyOrder() {
  for (const order of [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]) {
    const model = await openModel();
    const session = await model.session();
    const answer = session.generate(request('greedy_request'));
    for (const which of order) {
      if (which === 2) assert.deepEqual(await tokensOf(answer), numbers('greedy_tokens'));
      [model, session, answer][which].close();
    }
  }
}

/** @param {kinglet.Model} model */
async function training(model) {
  const trainer = await model.train(lessons, folder, request('training_config'));
  trainer.cancel();
  await fails('cancelled_code', () => trainer.next());
  const losses = numbers('training_losses');
  let step = 0;
  for await (const report of trainer) {
    assert(report.step === step + 1 && report.steps === losses.length && !report.rolledBack);
    assert(Math.abs(report.loss - losses[step]) < 0.02, String(report.loss));
    step++;
  }
  assert.equal(step, losses.length);
  assert.equal((await trainer.finish()).steps, losses.length);
  const adapter = trainer.adapter();
  trainer.close();
  assert.equal(adapter.info.rank, request('training_config').rank);
  const session = await model.session();
  session.setAdapters([adapter, [await model.adapter(`${folder}/adapter.gguf`), -1]]);
  // An adapter and its opposite are the model as it is.
  assert.deepEqual(await tokensOf(session.generate(request('greedy_request'))), numbers('greedy_tokens'));
}

assert(kinglet.version() && Number(kinglet.build().abi) >= 1 && kinglet.devices()[0].backend === 'cpu');
const tiny = await openModel();
assert(tiny.info.family === 'llama' && tiny.chatTemplate?.includes('im_start'));
const estimated = kinglet.estimate(path, { backend: 'cpu' });
assert(estimated.total >= (await tiny.session()).memory.total && estimated.mapped === estimated.weights);
tokens(tiny);
await answers(tiny);
await splitUtf8(tiny);
await structured(tiny);
await errors(tiny);
await cancels(tiny);
await windows(tiny);
await training(tiny);
await anyOrder();
const inMemory = await kinglet.Model.open(readFileSync(path), { backend: 'cpu', threads: 2 });
assert.deepEqual(await tokensOf((await inMemory.session()).generate(request('greedy_request'))), numbers('greedy_tokens'));
console.log('conforms');
