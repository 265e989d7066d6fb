"""Third-party clients: OpenAI's, LangChain's and lm_eval's."""

import asyncio
import json

import pytest

from mamba_jax.evaluating import lm_eval_tasks
from mamba_jax.evaluating.scorer import Scorer
from mamba_jax.exporting import tokenizer_files
from tests.support.tiny_models import TOKENIZER, model_of

from .conftest import offline
from .test_api import CHAT_TEXT, serving


@pytest.fixture(scope="module")
def port():
    with serving() as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")


class TestOpenAI:
    def test_models(self, client):
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"

    def test_completions(self, client):
        how = {"model": "tiny", "prompt": "def main(", "max_tokens": 12, "temperature": 0}
        whole = client.completions.create(**how, logprobs=2)
        assert whole.choices[0].text == offline("mamba", "def main(")
        assert len(whole.choices[0].logprobs.tokens) == whole.usage.completion_tokens
        options = {"include_usage": True}
        chunks = list(client.completions.create(**how, stream=True, stream_options=options))
        assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

    def test_chats(self, client):
        messages = [{"role": "user", "content": "Hi"}]
        how = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
        expected = _chat_answer()
        whole = client.chat.completions.create(**how, logprobs=True, top_logprobs=2)
        assert whole.choices[0].message.content == expected
        assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
        chunks = client.chat.completions.create(**how, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected

    def test_max_tokens_above_the_limit_is_clamped(self, client):
        text = offline("mamba", "def main(")
        how = {"model": "tiny", "prompt": "def main(", "temperature": 0, "stop": text[7:9]}
        for max_tokens in (-1, 10**6):
            answer = client.completions.create(**how, max_tokens=max_tokens)
            assert answer.choices[0].text == text[: text.index(text[7:9])]

    def test_errors_are_its_own(self, client):
        openai = pytest.importorskip("openai")
        with pytest.raises(openai.BadRequestError, match="best_of=3 is not supported"):
            client.completions.create(model="tiny", prompt="a", best_of=3)
        with pytest.raises(openai.NotFoundError, match="model 'other' does not exist"):
            client.completions.create(model="other", prompt="a")


@pytest.fixture
def how(port):
    """The arguments of LangChain's clients. They send every field that OpenAI has, most of them
    as null or as the default."""
    pytest.importorskip("langchain_openai")
    settings = {"model": "tiny", "api_key": "none", "max_retries": 0}
    return settings | {
        "base_url": f"http://127.0.0.1:{port}/v1",
        "temperature": 0,
        "max_tokens": 12,
    }


class TestLangChain:
    def test_completions(self, how):
        from langchain_openai import OpenAI

        llm, prompts = OpenAI(**how), ["def main(", "to be"]
        texts = [offline("mamba", prompt) for prompt in prompts]
        assert llm.invoke(prompts[0]) == texts[0]
        assert "".join(llm.stream(prompts[0])) == texts[0]
        assert llm.batch(prompts) == texts
        result = OpenAI(**how, n=2, best_of=2, logprobs=1).generate(prompts)
        assert [[one.text for one in of_prompt] for of_prompt in result.generations] == [
            [text, text] for text in texts
        ]

    def test_chats(self, how):
        from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
        from langchain_openai import ChatOpenAI

        chat, expected = ChatOpenAI(**how), _chat_answer()
        said = chat.invoke("Hi")
        assert said.content == expected
        assert said.usage_metadata["output_tokens"] > 0
        assert "".join(chunk.content for chunk in chat.stream("Hi")) == expected
        assert [each.content for each in chat.batch(["Hi", "Hi"])] == [expected] * 2
        told = ChatOpenAI(**how, logprobs=True, top_logprobs=2, seed=1, n=1).invoke("Hi")
        assert len(told.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
        history = [  # of an agent
            SystemMessage("Be brief."),
            HumanMessage([{"type": "text", "text": "Hi"}]),
            AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "c"}]),
            ToolMessage("3", tool_call_id="c"),
        ]
        assert isinstance(chat.invoke(history).content, str)

    def test_without_waiting(self, how):
        from langchain_openai import ChatOpenAI, OpenAI

        async def ask():
            llm, chat = OpenAI(**how), ChatOpenAI(**how)
            whole = asyncio.gather(llm.ainvoke("to be"), chat.ainvoke("Hi"))
            pieces = [piece async for piece in llm.astream("to be")]
            chunks = [chunk.content async for chunk in chat.astream("Hi")]
            return *await whole, "".join(pieces), "".join(chunks)

        text, answer, streamed_text, streamed_answer = asyncio.run(ask())
        assert text == streamed_text == offline("mamba", "to be")
        assert answer.content == streamed_answer == _chat_answer()


def _chat_answer():
    return offline("mamba", CHAT_TEXT).partition("\n\nuser:")[0].removeprefix(" ")


TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
""",
    "write": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.mark.slow  # imports transformers
def test_lm_evals_own_client_finds_what_evaluate_finds(port, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    for needed in ("transformers", "tenacity", "aiohttp"):
        pytest.importorskip(needed)
    from lm_eval.tasks import TaskManager

    questions = ["def main(", "to be or not", "x = 1", "import os", "The "]
    with open(tmp_path / "data.jsonl", "w") as file:
        for i, question in enumerate(questions):
            written = offline("mamba", question, 9).partition("\n\n")[0]
            choices = [" a", " the end", "\tb"]
            row = {"question": question, "choices": choices, "label": i % 3}
            file.write(json.dumps(row | {"written": written if i < 3 else "not this"}) + "\n")
    for name, text in TASKS.items():
        data = (
            f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}"
        )
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{data}\ntest_split: test{text}")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, content in tokenizer_files.files(TOKENIZER, fills_in=False).items():
        (folder / name).write_text(json.dumps(content))
    ours = Scorer([model_of("mamba")], batch_size=4, chunk_tokens=32)
    server = {
        "model": "tiny",
        "base_url": f"http://127.0.0.1:{port}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(folder),
        "max_retries": 1,
    }
    results = [
        lm_eval.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
        for model, arguments in (
            (lm_eval_tasks.language_model(ours), None),
            ("local-completions", server),
        )
    ]
    first, second = ([r["samples"][task] for task in TASKS] for r in results)
    assert results[1]["results"]["write"]["exact_match,none"] == pytest.approx(3 / 5)
    for ours_of_task, theirs_of_task in zip(first, second, strict=True):
        for a, b in zip(ours_of_task, theirs_of_task, strict=True):
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                if isinstance(x, str):
                    assert x == y
                else:
                    assert float(x[0]) == pytest.approx(float(y[0]), abs=1e-3)  # float32
                    assert x[1] == y[1]
