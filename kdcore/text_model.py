"""The language model that a plugin's user names as teacher: a table of the configuration. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from kdcore.options import option

__all__ = ["LLAMA_CPP", "TextModel"]

LLAMA_CPP = "llama.cpp"


@frozen(kw_only=True)
class TextModel:
    """A language model that is asked in words, by `kdcore.run.Run.ask`.

    As a plugin's field (``teacher: TextModel = option(TextModel(), "...")``) it is the table ``[teacher]`` of its
    configuration.
    """

    model: str = option(
        "", "its name at the endpoint; for llama.cpp a GGUF file; without an endpoint a folder or hub name"
    )
    endpoint: str = option(
        "",
        "base URL of an OpenAI-compatible server; 'llama.cpp' serves a GGUF file from this machine; empty runs the "
        "model here with transformers",
        operational=True,
    )
    key_variable: str = option(
        "OPENAI_API_KEY", "environment variable that holds the key; local servers need none", operational=True
    )
    identity: str = option("", "tells it from another model of that name; changed, everything is asked anew")
    temperature: float = option(1.0, "of sampling; 0 takes the most probable token", least=0)
    max_tokens: int = option(512, "longest answer, in tokens", least=1)
    extra: Mapping[str, Any] = option({}, "further parameters of every request, as the endpoint names them")
    in_flight: int = option(8, "requests at once", least=1, operational=True)
    requests_per_minute: int | None = option(None, "limit of requests", least=1, operational=True)
    tokens_per_minute: int | None = option(
        None, "limit of tokens, of prompts and answers together", least=1, operational=True
    )
    timeout: float = option(120.0, "seconds after which an attempt is given up", above=0, operational=True)
    retries: int = option(8, "further attempts where the endpoint fails or is busy", least=0, operational=True)
    prompt_price: float = option(0.0, "price of a million prompt tokens", least=0, operational=True)
    answer_price: float = option(0.0, "price of a million answer tokens", least=0, operational=True)

    @property
    def is_remote(self) -> bool:
        """Whether it is asked over a network, if only this machine's own."""
        return self.endpoint not in ("", LLAMA_CPP)

    def price(self, prompt_tokens: int, answer_tokens: int) -> float:
        """What so many tokens cost, in the currency of the prices."""
        return (prompt_tokens * self.prompt_price + answer_tokens * self.answer_price) / 1e6
