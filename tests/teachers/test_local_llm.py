from __future__ import annotations

import asyncio
import re
import shutil
import threading

import pytest
import torch
from attrs import evolve
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdcore.errors import InputError, RunError
from kdcore.teachers.llm import client_of
from kdcore.teachers.local_llm import LocalClient
from kdcore.teachers.text import Attachment, RefusedError, Request
from kdcore.text_model import TextModel

PROMPTS = (
    "A",
    "The river",
    "Write a sentence about the sea.",
    "one two three four five six seven",
    "Why? Because " * 8,
)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of random weights whose next tokens are not all as probable, and its byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PROMPTS, trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    return path


def ask(prompt=PROMPTS[1], sample=0, **parameters):
    messages = [{"role": "user", "content": prompt}]
    return Request(model="tiny", messages=messages, sample=sample, parameters={"max_tokens": 16} | parameters)


def answers(folder, requests, at_once=True, use=lambda client: None, **fields):
    """The completions, or the errors, of requests that are asked at once or after one another."""

    async def main():
        client = client_of(TextModel(model=str(folder), **fields))
        use(client)
        try:
            if at_once:
                return await asyncio.gather(*map(client.complete, requests), return_exceptions=True)
            return [await client.complete(request) for request in requests]
        finally:
            await client.close()

    return asyncio.run(main())


@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 20}, {"temperature": 0}])
def test_an_answer_is_the_same_alone_and_in_a_batch(folder, parameters):
    requests = [ask(prompt, max_tokens=8 + 4 * place, **parameters) for place, prompt in enumerate(PROMPTS)]
    alone = answers(folder, requests, at_once=False)
    together = answers(folder, requests)
    assert [completion.text for completion in together] == [completion.text for completion in alone]
    assert len({completion.text for completion in alone}) == len(PROMPTS)


def test_samples_and_seeds_differ_and_can_be_repeated(folder):
    requests = [ask(), ask(sample=1), ask(seed=1), ask()]
    texts = [completion.text for completion in answers(folder, requests)]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


def test_the_most_probable_tokens_are_those_of_transformers(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(PROMPTS[1], return_tensors="pt")
    expected = greedy_ids(folder)
    request = ask(temperature=0, logprobs=True, top_logprobs=3)
    [completion, _] = answers(folder, [request, ask(PROMPTS[4])])
    assert completion.text == tokenizer.decode(expected, skip_special_tokens=True)

    whole = torch.cat([ids["input_ids"][0], expected])
    with torch.no_grad():
        log_probabilities = model(whole[None]).logits[0].log_softmax(-1)[ids["input_ids"].shape[1] - 1 :]
    for token, number, row in zip(completion.tokens, expected, log_probabilities):
        assert token.log_probability == pytest.approx(row[number].item(), abs=1e-4)
        assert [value for _, value in token.alternatives] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert len(completion.tokens) == completion.answer_tokens == 16


def greedy_ids(folder):
    """What transformers generates of the first prompt that is asked."""
    model = LlamaForCausalLM.from_pretrained(folder)
    ids = PreTrainedTokenizerFast.from_pretrained(folder)(PROMPTS[1], return_tensors="pt")
    return model.generate(**ids, do_sample=False, max_new_tokens=16, pad_token_id=0)[0, ids["input_ids"].shape[1] :]


def test_an_answer_ends_at_its_length_or_at_a_stop_text(folder):
    """At temperature 0 there is no noise, so a shorter answer is the beginning of the whole one."""
    [whole] = answers(folder, [ask(temperature=0)])
    stop = whole.text[6:8]
    stopped = ask(temperature=0, stop=["never", stop], logprobs=True)
    [alone] = answers(folder, [stopped])
    cut, short, _ = answers(folder, [stopped, ask(temperature=0, max_tokens=3), ask(PROMPTS[0], max_tokens=40)])
    assert cut == evolve(alone, seconds=cut.seconds, tokens=cut.tokens)
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert len(cut.tokens) < cut.answer_tokens < whole.answer_tokens
    assert whole.text.startswith(short.text)
    assert short.answer_tokens == 3
    assert (whole.finish, short.finish, cut.finish) == ("length", "length", "stop")


def test_the_end_token_ends_an_answer(folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = greedy_ids(folder).tolist()
    model.generation_config.eos_token_id = [0, ids[4]]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    cut, _ = answers(tmp_path, [ask(temperature=0), ask(PROMPTS[4], max_tokens=40)])
    assert (cut.text, cut.finish) == (tokenizer.decode(ids[: ids.index(ids[4])]), "stop")
    assert cut.answer_tokens == ids.index(ids[4]) + 1


def test_a_chat_template_is_used_where_there_is_one(folder, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    request = Request(model="tiny", messages=turns, parameters={"temperature": 0, "max_tokens": 8})
    [templated] = answers(tmp_path, [request])
    [plain] = answers(folder, [request])
    [by_hand, joined] = answers(
        folder,
        [
            ask("<system>Be brief.<user>Hello<bot>", temperature=0, max_tokens=8),
            ask("Be brief.\n\nHello", temperature=0, max_tokens=8),
        ],
    )
    assert (templated.text, plain.text) == (by_hand.text, joined.text)
    assert templated.text != plain.text


def test_requests_are_computed_in_batches_of_at_most_those_in_flight(folder):
    sizes = []

    def spy(client):
        generate = client._generate
        client._generate = lambda jobs: sizes.append(len(jobs)) or generate(jobs)

    results = answers(folder, [ask(sample=n, max_tokens=2) for n in range(7)], use=spy, in_flight=3)
    assert sizes == [3, 3, 1]
    assert all(completion.answer_tokens == 2 for completion in results)


def test_a_failure_reaches_the_callers_and_the_next_request_is_answered(folder):
    failures = [torch.OutOfMemoryError("CUDA out of memory"), ZeroDivisionError()]

    def fail_twice(client):
        generate = client._generate

        def call(jobs):
            if failures:
                raise failures.pop(0)
            return generate(jobs)

        client._generate = call

    first, second, third = answers(folder, [ask(sample=n) for n in range(3)], use=fail_twice, in_flight=1)
    assert isinstance(first, RunError)
    assert "out of memory; lower in_flight or max_tokens" in str(first)
    assert isinstance(second, ZeroDivisionError)
    assert third.text


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            ask(frequency_penalty=1),
            "extra: a model run here knows no frequency_penalty; it knows logprobs, max_tokens, ",
        ),
        (
            ask("x" * 300),
            r"the prompt of \d+ tokens and an answer of 16 do not fit the model's 256; shorten it or lower max",
        ),
        (ask(""), "the prompt is empty"),
        (
            Request(
                model="tiny", messages=[{"role": "user", "content": "?"}], attachments=[Attachment("image/png", b"")]
            ),
            "takes text only; name an endpoint for images",
        ),
    ],
)
def test_a_request_that_it_cannot_answer_leaves_the_others_alone(folder, request_, message):
    refused, answered = answers(folder, [request_, ask()])
    assert isinstance(refused, RefusedError) == ("prompt" in message)
    with pytest.raises(InputError, match=message):
        raise refused
    assert answered.text


def test_prices_are_counted(folder):
    [completion] = answers(folder, [ask(max_tokens=4)], prompt_price=3.0, answer_price=5.0)
    assert completion.price == pytest.approx((completion.prompt_tokens * 3 + 4 * 5) / 1e6)


def test_closing_drops_what_waits(folder):
    async def main():
        client = LocalClient(TextModel(model=str(folder), in_flight=1))
        computing, closing = threading.Event(), threading.Event()
        generate = client._generate

        def held(jobs):
            computing.set()
            assert closing.wait(60)
            return generate(jobs)

        client._generate = held
        tasks = [asyncio.create_task(client.complete(ask(sample=n))) for n in range(3)]
        assert await asyncio.to_thread(computing.wait, 60)
        closed = asyncio.create_task(client.close())
        await asyncio.sleep(0)
        closing.set()
        await closed
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *rest = asyncio.run(main())
    assert first.text
    assert all(isinstance(each, asyncio.CancelledError) for each in rest)


def test_what_nobody_wants_any_more_is_not_computed(folder):
    def refuse():
        raise ZeroDivisionError

    async def main():
        client = LocalClient(TextModel(model=str(folder)))
        sizes, generate = [], client._generate
        client._generate = lambda jobs: sizes.append(len(jobs)) or generate(jobs)
        results = await asyncio.gather(
            client.complete(ask(max_tokens=2)), client.complete(ask(sample=1), refuse), return_exceptions=True
        )
        await client.close()
        return sizes, results

    sizes, (first, second) = asyncio.run(main())
    assert sizes == [1]
    assert first.text
    assert isinstance(second, ZeroDivisionError)


def test_a_pointer_in_the_place_of_weights_is_one_line(folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    with pytest.raises(InputError, match=f"^model: {re.escape(str(copy))} cannot be loaded: .+; check its name$"):
        client_of(TextModel(model=str(copy)))
    with pytest.raises(InputError, match=r"^~nosuchuser/x: there is no such user"):
        client_of(TextModel(model="~nosuchuser/x"))
