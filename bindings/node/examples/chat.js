// Asks a model one question and shows the answer as it comes; Ctrl-C stops it.   node chat.js MODEL.gguf "QUESTION"
import process from 'node:process';
import { Model } from 'kinglet';

const [path, question = 'Why is the sky blue?'] = process.argv.slice(2);
const stop = new AbortController();
process.once('SIGINT', () => stop.abort());

const model = await Model.open(path);
const session = await model.session();
try {
  const answer = session.chat([{ role: 'user', content: question }], { max_tokens: 200, signal: stop.signal });
  for await (const piece of answer) process.stdout.write(piece.text);
  process.stdout.write('\n');
} catch (error) {
  if (!stop.signal.aborted) throw error;
}
