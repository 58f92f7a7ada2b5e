"""What every binding must do, on the tiny model that ``cargo run -p kinglet-ffi --example tiny`` writes.

conformance.py VALUES MODEL LESSONS FOLDER, where VALUES is ``bindings/conformance.tsv``
"""

import asyncio
import json
import sys
import threading
from itertools import permutations
from pathlib import Path

import kinglet

values = dict(line.split("\t") for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines())
path, lessons, folder = sys.argv[2:5]
open_model = lambda: kinglet.Model(path, backend="cpu", threads=2)  # noqa: E731


def numbers(name):
    return [int(word) for word in values[name].split()]


def request(name):
    return json.loads(values[name])


def fails(code, function, word=""):
    try:
        function()
    except kinglet.Error as error:
        assert error.code == int(values[code]) and word in str(error), (error.code, str(error))
    else:
        raise AssertionError(f"nothing was wrong, but {code} was to come")


def tokens_of(answer):
    return [token for piece in answer for token in piece.tokens]


def tokens(model):
    ids = model.tokenize(values["text"])
    assert ids == numbers("text_tokens"), ids
    assert model.detokenize(ids) == values["text"]
    assert b"".join(model.token_bytes(token) for token in ids) == values["text"].encode()
    assert model.tokenize("") == []


def answers(model):
    session = model.session()
    assert tokens_of(session.complete(**request("greedy_request"))) == numbers("greedy_tokens")
    for reused in (0, int(values["chat_prompt_tokens"]) - 1):
        answer = session.chat(**request("chat_request"))
        assert tokens_of(answer) == numbers("chat_tokens")
        assert answer.end == kinglet.EndReason.LENGTH and answer.prompt_tokens == int(values["chat_prompt_tokens"])
        assert answer.reused_tokens >= reused

    async def collect():
        return [token async for piece in session.chat(**request("chat_request")) for token in piece.tokens]

    assert asyncio.run(collect()) == numbers("chat_tokens")
    session.reset()
    assert len(session) == 0
    prompt = numbers("text_tokens")
    session.feed(prompt[:-1])
    fork = session.fork()
    fork.feed(prompt[-1:])
    session.feed(prompt[-1:])
    assert fork.logits() == session.logits()
    session.rewind(1)
    assert len(session) == 1 and len(fork) == len(prompt)
    assert all(score < 0 for score in fork.score(prompt))


def split_utf8(model):
    pieces = [piece.text for piece in model.session().complete(**request("emoji_request"))]
    assert len(pieces) == int(values["emoji_pieces"]) and "".join(pieces) == values["emoji_text"], pieces
    assert all(piece in ("", values["emoji_text"]) for piece in pieces), "a character was split"


def structured(model):
    session = model.session()
    for _ in range(5):
        answer = session.complete(**request("schema_request"))
        text = answer.read()
        person = json.loads(text)
        assert set(person) == {"name", "age"} and len(person["name"]) <= 5 and 0 <= person["age"] <= 99, text
        assert answer.end == kinglet.EndReason.END_OF_TEXT
        assert answer.message == {"role": "assistant", "content": text}
    fails("unknown_key_code", lambda: session.complete(**request("wrong_schema_request")), values["wrong_schema"])


def errors(model):
    session = model.session()
    fails("missing_model_code", lambda: kinglet.Model("/no/such/model"))
    with kinglet.Model(path, backend="cpu", gpu_layers=1) as on_cpu:
        fails("wrong_options_code", on_cpu.session, values["layers_on_cpu"])
    fails("wrong_options_code", lambda: kinglet.Model(path, tuning_folder=""), values["empty_folder"])
    fails("unknown_key_code", lambda: session._generate(request("unknown_key_request")), values["unknown_key"])
    fails("context_full_code", lambda: session.feed([1] * 100000))
    answer = session.complete(**request("greedy_request"))
    fails("busy_code", session.reset)
    answer.read()
    session.reset()


def cancels(model):
    session = model.session()
    answer = session.complete(**request("endless_request"))
    next(answer)
    thread = threading.Thread(target=answer.cancel)
    thread.start()
    thread.join()
    answer.read()
    assert answer.end == kinglet.EndReason.CANCELLED

    async def abandoned():
        with session.complete(**request("endless_request")) as answer:
            async for _ in answer:
                pass

    async def cancelled():
        task = asyncio.create_task(abandoned())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        # A tiny model may have filled its window before.
        assert task.cancelled() or task.exception() is None

    for _ in range(20):
        asyncio.run(cancelled())
        session.reset()  # the threads of the loop have ended, and with them the call


def windows(model):
    session, other = model.session(), model.session()
    prompt, window = numbers("text_tokens"), folder + ".window"
    assert abs(sum(x * x for x in session.embed(prompt)) - 1) < 1e-4 and len(session) == 0
    session.feed(prompt)
    session.save(window)
    other.load(window)
    fails("damaged_window_code", lambda: other.load(path))
    session.feed(prompt[-1:])
    other.feed(prompt[-1:])
    assert session.logits() == other.logits()

    answer = other.complete(**request("greedy_request"))
    model.suspend()
    fails("suspended_code", lambda: next(answer))
    model.resume()
    assert tokens_of(answer) == numbers("greedy_tokens")
    assert model.trim() > 0
    assert tokens_of(other.complete(**request("greedy_request"))) == numbers("greedy_tokens")


def any_order():
    for order in permutations(range(3)):
        model = open_model()
        session = model.session()
        answer = session.complete(**request("greedy_request"))
        objects = [model, session, answer]
        for which in order:
            if which == 2:
                assert tokens_of(answer) == numbers("greedy_tokens")
            objects[which].close()
    assert tokens_of(open_model().session().complete(**request("greedy_request"))) == numbers("greedy_tokens")


def training(model):
    config = request("training_config")
    with model.train(lessons, folder, **config) as trainer:
        trainer.cancel()
        fails("cancelled_code", lambda: next(trainer))
        reports = list(trainer)
        assert [report.step for report in reports] == [1, 2] and not reports[0].rolled_back
        for report, loss in zip(reports, values["training_losses"].split()):
            assert abs(report.loss - float(loss)) < 0.02, report
        assert trainer.finish()["steps"] == 2
        adapter = trainer.adapter()
    assert adapter.info["rank"] == config["rank"]
    session = model.session()
    session.set_adapters([adapter, (model.adapter(Path(folder) / "adapter.gguf"), -1.0)])
    # An adapter and its opposite are the model as it is.
    assert tokens_of(session.complete(**request("greedy_request"))) == numbers("greedy_tokens")


assert kinglet.version() and kinglet.build()["abi"] >= 1 and kinglet.devices()[0]["backend"] == "cpu"
with open_model() as tiny:
    assert tiny.info["family"] == "llama" and "im_start" in (tiny.chat_template or "")
    estimated = kinglet.estimate(path, backend="cpu")
    assert estimated.total >= tiny.session().memory.total and estimated.mapped == estimated.weights
    tokens(tiny)
    answers(tiny)
    split_utf8(tiny)
    structured(tiny)
    errors(tiny)
    cancels(tiny)
    windows(tiny)
    training(tiny)
any_order()
in_memory = kinglet.Model(Path(path).read_bytes(), backend="cpu", threads=2)
assert tokens_of(in_memory.session().complete(**request("greedy_request"))) == numbers("greedy_tokens")
print("conforms")
