"""Clients of language models: an endpoint, a GGUF file served on this machine, or transformers. Imports no torch."""

from __future__ import annotations

from attrs import evolve

from kdcore.errors import InputError
from kdcore.teachers.endpoint import EndpointClient
from kdcore.teachers.structured import validated
from kdcore.teachers.text import TextClient
from kdcore.text_model import LLAMA_CPP, TextModel

__all__ = ["EndpointClient", "client_key", "client_of", "validated"]


def client_key(model: TextModel) -> str:
    """Models of one key share a client: they differ in what each request says by itself, such as the temperature."""
    longest = model.max_tokens if model.endpoint == LLAMA_CPP else 1  # a server's slots have room for it
    return repr(evolve(model, temperature=1.0, max_tokens=longest, extra={}, identity=""))


def client_of(model: TextModel, *, device: str = "cpu", threads: int = 1) -> TextClient:
    """The client that ``model.endpoint`` asks for.

    Starting a server or loading a model blocks, up to a minute. Close the client with ``await client.close()``.

    :param device: where a transformers model runs.
    :param threads: of a llama.cpp server; they wait for each other by spinning, so no more than there are idle cores.
    :raises InputError: the endpoint is no URL, the model cannot be found or loaded, or a package is missing.
    """
    if not model.model:
        raise InputError("model: is empty; name the language model")
    if model.endpoint == LLAMA_CPP:
        from kdcore.teachers.llama_server import LlamaClient

        return LlamaClient(model, threads=threads)
    if model.endpoint:
        return EndpointClient(model)
    from kdcore.teachers.local_llm import LocalClient

    return LocalClient(model, device=device)
