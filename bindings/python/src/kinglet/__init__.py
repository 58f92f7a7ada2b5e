"""Language models on your own device: chat, and teach them.

    import kinglet

    with kinglet.Model("model.gguf") as model, model.session() as session:
        for piece in session.chat([{"role": "user", "content": "Hello!"}]):
            print(piece.text, end="", flush=True)

Objects free themselves when Python forgets them, in any order; ``with`` frees them at once. Every call lets other threads
run. A model may be used by many threads; a session, a generation and a trainer take one call at a time and raise ``Busy``
otherwise. ``cancel`` may be called from any thread.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypedDict

from . import _native
from ._native import (
    ArgumentError,
    BudgetError,
    Busy,
    Cancelled,
    ContextFull,
    Error,
    FileError,
    Suspended,
    array,
    call,
    data,
    encode,
    ffi,
    handle,
    lib,
    string,
    struct,
)

__all__ = [
    "Adapter", "ArgumentError", "BudgetError", "Busy", "Cancelled", "ContextFull", "EndReason", "Error", "FileError",
    "Generation", "Memory", "Message", "Model", "Piece", "Report", "Session", "Suspended", "Trainer", "build", "devices", "estimate",
    "version",
]  # fmt: skip


class _Message(TypedDict):
    role: str


class Message(_Message, total=False):
    """A message of a conversation, in the shape of the OpenAI API."""

    content: str | list[dict[str, str]] | None
    tool_calls: list[dict[str, Any]]
    name: str
    tool_call_id: str
    reasoning_content: str


class EndReason(IntEnum):
    """Why an answer ended."""

    END_OF_TEXT = lib.KINGLET_END_OF_TEXT
    LENGTH = lib.KINGLET_END_LENGTH
    STOP = lib.KINGLET_END_STOP
    CONTEXT_FULL = lib.KINGLET_END_CONTEXT_FULL
    CANCELLED = lib.KINGLET_END_CANCELLED


@dataclass(frozen=True)
class Piece:
    """A piece of an answer: whole characters, and the tokens behind them."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes that a model with one session takes; ``mapped`` is what of the weights is read in place from the file, and the rest
    of the total is allocated."""

    weights: int
    kv_cache: int
    activations: int
    scratch: int
    adapters: int
    total: int
    mapped: int


@dataclass(frozen=True)
class Report:
    """What a training step did. Numbers that were not measured are NaN."""

    rolled_back: bool
    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    validation_loss: float
    reward_accuracy: float
    reward_margin: float
    note: str | None


def version() -> str:
    """The version of the library."""
    return string(lib.kinglet_version())


def build() -> dict[str, Any]:
    """How the library was built and what it uses of this processor."""
    return data(dict, lib.kinglet_build_json)


def devices() -> list[dict[str, Any]]:
    """The devices that models can run on; ``backend`` of each is what ``Model`` takes."""
    return data(list, lib.kinglet_devices_json)


class _Object:
    """Something that lives in the library."""

    _pointer: Any

    def close(self) -> None:
        """Frees the object now, or when the call that uses it is over; it cannot be used any more."""
        # A running call has a reference of its own; the last one frees.
        self._pointer = ffi.NULL

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _model_options(
    backend: str, threads: int, tuning_folder: str | os.PathLike[str] | None = None, **fields: int
) -> Any:
    name = ffi.new("char[]", backend.encode())
    folder = ffi.NULL if tuning_folder is None else ffi.new("char[]", encode(tuning_folder))
    options = struct("model_options", backend=name, threads=threads, tuning_folder=folder, **fields)
    # The texts must live as long as the struct.
    return options, (name, folder)


def _session_options(context: int, kv: str | None, chunk: int) -> Any:
    types = {None: 0, "F16": lib.KINGLET_KV_F16, "F32": lib.KINGLET_KV_F32, "Q8_0": lib.KINGLET_KV_Q8_0}
    if kv not in types:
        raise ArgumentError(lib.KINGLET_ERR_ARG, f"kv is {kv!r}; it must be F16, F32 or Q8_0")
    return struct("session_options", context_tokens=context, kv_type=types[kv], chunk_tokens=chunk)


def _memory(value: Any) -> Memory:
    return Memory(*(getattr(value, name) for name in Memory.__dataclass_fields__))


def estimate(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    threads: int = 0,
    context: int = 0,
    kv: str | None = None,
    chunk: int = 0,
    gpu_layers: int = 0,
    gpu_memory: int = 0,
    gpu_import: bool = False,
) -> Memory:
    """What opening a model and one session with a full window would take. Nothing is allocated."""
    memory = struct("memory")
    gpu = {"gpu_layers": gpu_layers, "gpu_memory": gpu_memory, "gpu_import": gpu_import}
    options, _texts = _model_options(backend, threads, None, **gpu)
    call(lib.kinglet_model_estimate, encode(path), options, _session_options(context, kv, chunk), memory)
    return _memory(memory)


class Model(_Object):
    """Weights with tokenizer and chat template, mapped from a GGUF file, or in memory."""

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes | bytearray | memoryview,
        *,
        backend: str = "auto",
        threads: int = 0,
        memory_budget: int = 0,
        prefix_cache: int = 0,
        gpu_layers: int = 0,
        gpu_memory: int = 0,
        gpu_import: bool = False,
        tuning_folder: str | os.PathLike[str] | None = None,
        tune_int8: bool = False,
        validate: bool = False,
        copy: bool = False,
    ) -> None:
        """Opens the file at the path ``source``, or the model in the bytes ``source``, which are copied. ``prefix_cache`` is how
        many bytes prompts may take that were read, so that sessions that begin alike share the work.

        A GPU runs the last ``gpu_layers`` layers and the CPU the others (0: all, or as many as the GPU's memory holds); it gets
        as many as ``gpu_memory`` bytes hold (0: no limit). With ``gpu_import`` it reads the weights from the mapped file, without
        a copy, where its driver allows that: for a GPU in the processor. With a ``tuning_folder`` its kernels are timed once,
        the times kept there, and the quickest taken; with ``tune_int8`` products of eight bits compete too, which are rounded
        more."""
        in_memory = isinstance(source, (bytes, bytearray, memoryview))
        flags = lib.KINGLET_MODEL_VALIDATE * validate | lib.KINGLET_MODEL_COPY * (copy or in_memory)
        budgets = {"memory_budget": memory_budget, "prefix_cache": prefix_cache}
        gpu = {"gpu_layers": gpu_layers, "gpu_memory": gpu_memory, "gpu_import": gpu_import}
        gpu["tuning"] = lib.KINGLET_TUNE_INT8 * tune_int8
        options, _texts = _model_options(backend, threads, tuning_folder, flags=flags, **budgets, **gpu)
        if isinstance(source, (bytes, bytearray, memoryview)):
            content = ffi.from_buffer(source)
            arguments = (content, len(content), ffi.NULL, ffi.NULL, options)
            self._pointer = handle("model", lib.kinglet_model_free, lib.kinglet_model_open_memory, *arguments)
        else:
            self._pointer = handle("model", lib.kinglet_model_free, lib.kinglet_model_open, encode(source), options)

    @property
    def info(self) -> dict[str, Any]:
        """What the model is."""
        return data(dict, lib.kinglet_model_info_json, self._pointer)

    @property
    def chat_template(self) -> str | None:
        """Its chat template; ``None`` for a base model."""
        return _native.text(lib.kinglet_model_chat_template, self._pointer)

    def tokenize(self, text: str | bytes, *, special: bool = False, control: bool = False) -> list[int]:
        """The tokens of a text; ``special`` adds BOS and EOS where the model wants them, ``control`` reads control tokens."""
        content = text.encode() if isinstance(text, str) else text
        flags = lib.KINGLET_TOKENIZE_SPECIAL * special | lib.KINGLET_TOKENIZE_CONTROL * control
        out, count = array("int32_t", lib.kinglet_tokenize, self._pointer, content, len(content), flags)
        return list(out[0:count])

    def detokenize(self, tokens: Sequence[int], *, control: bool = False) -> str:
        """The text of tokens."""
        flags = lib.KINGLET_DETOKENIZE_CONTROL * control
        out, count = array("char", lib.kinglet_detokenize, self._pointer, list(tokens), len(tokens), flags)
        return str(ffi.buffer(out, count)[:], "utf-8")

    def token_bytes(self, token: int, *, control: bool = False) -> bytes:
        """The bytes of one token, which may be a part of a character."""
        flags = lib.KINGLET_DETOKENIZE_CONTROL * control
        count, out = ffi.new("size_t *"), ffi.new("char[]", 4096)
        call(lib.kinglet_token_bytes, self._pointer, token, flags, out, 4096, count)
        return bytes(ffi.buffer(out, count[0]))

    def session(self, *, context: int = 0, kv: str | None = None, chunk: int = 0) -> Session:
        """A conversation: a window of ``context`` tokens (0: as many as the model was trained for)."""
        options = _session_options(context, kv, chunk)
        free, create = lib.kinglet_session_free, lib.kinglet_session_create
        return Session(handle("session", free, create, self._pointer, options))

    def trim(self) -> int:
        """Gives back memory that can be had again, and says how many bytes."""
        freed = ffi.new("uint64_t *")
        call(lib.kinglet_model_trim, self._pointer, freed)
        return int(freed[0])

    def suspend(self) -> None:
        """Lets nothing compute with the model until ``resume``: what would raises ``Suspended``."""
        call(lib.kinglet_model_suspend, self._pointer)

    def resume(self) -> None:
        """Takes ``suspend`` back."""
        call(lib.kinglet_model_resume, self._pointer)

    def adapter(self, path: str | os.PathLike[str]) -> Adapter:
        """The LoRA adapter at ``path``: a GGUF file, or a folder as PEFT writes it."""
        return Adapter(handle("adapter", lib.kinglet_adapter_free, lib.kinglet_adapter_open, self._pointer, encode(path)))

    def merge(
        self,
        adapters: Iterable[Adapter | tuple[Adapter, float]],
        path: str | os.PathLike[str],
        quant: str | None = None,
    ) -> None:
        """Writes a new model file with ``adapters`` inside; changed matrices get the type ``quant``, or keep theirs."""
        pointers, scales = _scaled(adapters)
        kind = quant.encode() if quant else ffi.NULL
        call(lib.kinglet_adapter_merge, self._pointer, pointers, scales, len(scales), encode(path), kind)

    def train(self, data: Any, output: str | os.PathLike[str], **config: Any) -> Trainer:
        """A training on the file or files ``data``, which writes into the folder ``output``. Settings are those of
        ``kinglet_trainer_create``: ``rank``, ``lr``, ``steps``, ``resume`` and more."""
        paths = [os.fspath(path) for path in ([data] if isinstance(data, (str, os.PathLike)) else data)]
        request = json.dumps({"data": paths, "output": os.fspath(output), **config}).encode()
        free, create = lib.kinglet_trainer_free, lib.kinglet_trainer_create
        return Trainer(handle("trainer", free, create, self._pointer, request))


def _scaled(adapters: Iterable[Adapter | tuple[Adapter, float]]) -> tuple[Any, Any]:
    pairs = [(a, 1.0) if isinstance(a, Adapter) else a for a in adapters]
    pointers = ffi.new("kinglet_adapter *[]", [adapter._pointer for adapter, _ in pairs])
    return pointers, ffi.new("float[]", [scale for _, scale in pairs])


class Adapter(_Object):
    """Small trained corrections to a model."""

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer

    @property
    def info(self) -> dict[str, Any]:
        """What the adapter is."""
        return data(dict, lib.kinglet_adapter_info_json, self._pointer)


class Session(_Object):
    """One conversation. ``len`` of it is how many tokens its window holds."""

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer

    def __len__(self) -> int:
        count = ffi.new("size_t *")
        call(lib.kinglet_session_token_count, self._pointer, count)
        return int(count[0])

    def __bool__(self) -> bool:
        return True

    def chat(self, messages: Sequence[Message], **request: Any) -> Generation:
        """Answers a conversation; what the session has read of it is not computed again. ``request`` has the keys of
        ``kinglet_generate``: ``max_tokens``, ``stop``, ``tools``, ``response_format``, ``sampling`` and more."""
        return self._generate({"messages": list(messages), **request})

    def complete(self, prompt: str, **request: Any) -> Generation:
        """Continues a text, without the chat template."""
        return self._generate({"prompt": prompt, **request})

    def _generate(self, request: Mapping[str, Any]) -> Generation:
        free, create = lib.kinglet_generation_free, lib.kinglet_generate
        return Generation(handle("generation", free, create, self._pointer, json.dumps(request).encode()))

    def feed(self, tokens: Sequence[int]) -> None:
        """Reads tokens."""
        call(lib.kinglet_session_feed, self._pointer, list(tokens), len(tokens))

    def logits(self) -> list[float]:
        """The logits of what follows the tokens fed last."""
        out, count = array("float", lib.kinglet_session_logits, self._pointer)
        return list(out[0:count])

    def score(self, tokens: Sequence[int]) -> list[float]:
        """Reads tokens and gives the log-probability of each but the first."""
        out = ffi.new("float[]", max(len(tokens) - 1, 1))
        call(lib.kinglet_session_score, self._pointer, list(tokens), len(tokens), out, max(len(tokens) - 1, 0))
        return list(out[0 : len(tokens) - 1])

    def embed(self, tokens: Sequence[int]) -> list[float]:
        """What tokens mean together, as a direction of length 1; the window is left as it is."""
        out, count = array("float", lib.kinglet_session_embed, self._pointer, list(tokens), len(tokens))
        return list(out[0:count])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the window to a file."""
        call(lib.kinglet_session_save, self._pointer, encode(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes the window from a file of ``save``, in place of this one."""
        call(lib.kinglet_session_load, self._pointer, encode(path))

    def fork(self) -> Session:
        """A second session that has read the same tokens."""
        return Session(handle("session", lib.kinglet_session_free, lib.kinglet_session_fork, self._pointer))

    def reset(self) -> None:
        """Forgets all tokens."""
        call(lib.kinglet_session_reset, self._pointer)

    def rewind(self, length: int) -> None:
        """Keeps the first ``length`` tokens."""
        call(lib.kinglet_session_rewind, self._pointer, length)

    def set_adapters(self, adapters: Iterable[Adapter | tuple[Adapter, float]] = ()) -> None:
        """Puts adapters in force, each with its scale, in place of those before."""
        pointers, scales = _scaled(adapters)
        call(lib.kinglet_session_set_adapters, self._pointer, pointers, scales, len(scales))

    @property
    def memory(self) -> Memory:
        """What the session takes now."""
        memory = struct("memory")
        call(lib.kinglet_session_memory, self._pointer, memory)
        return _memory(memory)

    def cancel(self) -> None:
        """Stops ``feed``, ``score`` or ``embed``, if one is running on another thread."""
        lib.kinglet_session_cancel(self._pointer)


class Generation(_Object, Iterator[Piece], AsyncIterator[Piece]):
    """An answer under way: pieces, one after the other. When they have ended, ``end`` says why."""

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer
        self._event = struct("event")
        self.end: EndReason | None = None
        self.prompt_tokens = 0
        self.reused_tokens = 0
        self.prefilled_tokens = 0
        self.output_tokens = 0
        self.prefill_ms = 0.0
        self.decode_ms = 0.0

    def __next__(self) -> Piece:
        piece = self._pull()
        if piece is None:
            raise StopIteration
        return piece

    async def __anext__(self) -> Piece:
        try:
            piece = await asyncio.to_thread(self._pull)
        except asyncio.CancelledError:
            # The thread goes on, to the end that this brings about.
            self.cancel()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    @property
    def message(self) -> dict[str, Any]:
        """The answer so far as a message, with calls of tools told from text; it may go back into ``chat``."""
        return data(dict, lib.kinglet_generation_message_json, self._pointer)

    def _pull(self) -> Piece | None:
        event = self._event
        while call(lib.kinglet_generation_next, self._pointer, event) == lib.KINGLET_OK:
            for name in ("prompt_tokens", "reused_tokens", "prefilled_tokens", "output_tokens", "prefill_ms", "decode_ms"):
                setattr(self, name, getattr(event, name))
            if event.kind == lib.KINGLET_EVENT_TEXT:
                text = ffi.buffer(event.text, event.text_len)[:].decode()
                return Piece(text, tuple(event.tokens[0 : event.n_tokens]) if event.n_tokens else ())
            if event.kind == lib.KINGLET_EVENT_END:
                self.end = EndReason(event.end_reason)
        return None

    def read(self) -> str:
        """The rest of the answer."""
        return "".join(piece.text for piece in self)

    def cancel(self) -> None:
        """Ends the answer, from any thread."""
        lib.kinglet_generation_cancel(self._pointer)


class Trainer(_Object, Iterator[Report]):
    """A training run: each step is taken when its report is asked for."""

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer
        self._report = struct("train_report")

    def __next__(self) -> Report:
        r = self._report
        if call(lib.kinglet_trainer_step, self._pointer, r) == lib.KINGLET_DONE:
            raise StopIteration
        note = None if r.note == ffi.NULL else string(r.note)
        names = [name for name in Report.__dataclass_fields__ if name not in ("rolled_back", "note")]
        numbers = {name: getattr(r, name) for name in names}
        return Report(rolled_back=r.kind == lib.KINGLET_TRAIN_ROLLED_BACK, note=note, **numbers)

    @property
    def info(self) -> dict[str, Any]:
        """What is ahead."""
        return data(dict, lib.kinglet_trainer_info_json, self._pointer)

    def save(self) -> None:
        """Writes a checkpoint into the output folder."""
        call(lib.kinglet_trainer_save, self._pointer)

    def adapter(self) -> Adapter:
        """The adapter as it is after the steps so far."""
        return Adapter(handle("adapter", lib.kinglet_adapter_free, lib.kinglet_trainer_adapter, self._pointer))

    def finish(self) -> dict[str, Any]:
        """Writes what was trained and a report into the output folder."""
        return data(dict, lib.kinglet_trainer_finish, self._pointer)

    def cancel(self) -> None:
        """Stops the step that is running, or else the next, from any thread: it raises ``Cancelled``."""
        lib.kinglet_trainer_cancel(self._pointer)
