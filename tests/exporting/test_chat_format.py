"""Templates of other engines render chats as training and the server do."""

import functools
import json
import re
import shutil
import subprocess

import pytest

from mamba_jax.exporting import chat_format
from mamba_jax.generation.chat import STOP, prompt_of

# Chats, and the text up to where the next answer begins.
CHATS = {
    "one turn": ([("user", "hi")], "user: hi\n\nassistant:"),
    "turns": (
        [("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2."), ("user", "2 + 2?")],
        "system: Be brief.\n\nuser: 1 + 1?\n\nassistant: 2.\n\nuser: 2 + 2?\n\nassistant:",
    ),
    "white space and unicode": (
        [("user", "  naïve 東京 🙂\n\n "), ("assistant", " 'yes' "), ("user", '"\\n {{ x }}')],
        "user:   naïve 東京 🙂\n\n \n\nassistant:  'yes' \n\nuser: \"\\n {{ x }}\n\nassistant:",
    ),
    "no content": (
        [("system", ""), ("user", "a"), ("assistant", ""), ("tool", "b")],
        "user: a\n\ntool: b\n\nassistant:",
    ),
    "developer": (
        [("developer", "Be brief."), ("user", "a <|endoftext|> b")],
        "system: Be brief.\n\nuser: a <|endoftext|> b\n\nassistant:",
    ),
}
# What Ollama's template language cannot do, or never has to.
MORE = {
    "blank content": (
        [("user", " \n"), ("user", "a"), ("assistant", None)],
        "user: a\n\nassistant:",
    ),
    "parts": (
        [("user", [{"type": "text", "text": " a"}, {"type": "image"}, "b "])],
        "user:  a\nb \n\nassistant:",
    ),
    "other names of roles": (
        [("Human", "a"), ("gpt", "b"), ("bot", "c"), ("Narrator", "d")],
        "user: a\n\nassistant: b\n\nassistant: c\n\nnarrator: d\n\nassistant:",
    ),
}


def messages_of(turns):
    return [{"role": role, "content": content} for role, content in turns]


def rendered(messages, *, begins=False, answers=True):
    jinja2 = pytest.importorskip("jinja2", reason="needs jinja2")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    template = environment.from_string(chat_format.jinja(begins=begins))
    return template.render(messages=messages, bos_token="<s>", add_generation_prompt=answers)


@pytest.mark.parametrize("name", [*CHATS, *MORE])
def test_the_jinja_template(name):
    turns, text = (CHATS | MORE)[name]
    messages = messages_of(turns)
    assert rendered(messages) == text
    assert prompt_of(messages) == text
    assert rendered(messages, begins=True) == "<s>" + text
    assert rendered(messages, answers=False) == text.removesuffix("\n\nassistant:")


def test_tool_calls_are_lines_of_json():
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": '{"town": "日本"}'}},
        {"name": "time", "arguments": {"zone": "é", "hours": 12}},
    ]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": []},
        {"role": "assistant", "content": "b", "tool_calls": calls},
    ]
    assert rendered(messages) == (
        'user: a\n\nassistant: b\n{"name": "weather", "arguments": {"town": "日本"}}\n'
        '{"name": "time", "arguments": {"hours": 12, "zone": "é"}}\n\nassistant:'
    )


def test_no_text_is_refused():
    jinja2 = pytest.importorskip("jinja2", reason="needs jinja2")
    for messages in ([], messages_of([("user", " ")])):
        with pytest.raises(jinja2.TemplateError, match="messages hold no text"):
            rendered(messages)


def parsed(modelfile):
    """A Modelfile's commands by Ollama's rules: quotes are removed, nothing is unescaped."""
    command = re.compile(r'^(\w+) (?:(stop) )?(?:"""(.*?)"""|"([^"\n]*)"|(.*?))$', re.S | re.M)
    lines = re.sub(r"^#.*\n", "", modelfile, flags=re.M)
    return [(c, a or b or d) for c, _, a, b, d in command.findall(lines)]


def test_the_modelfile():
    found = parsed(chat_format.modelfile("model.gguf", "<|endoftext|>", renders_chats=True))
    stops = [("PARAMETER", "<|endoftext|>"), ("PARAMETER", STOP)]
    assert found == [("FROM", "./model.gguf"), stops[0], ("TEMPLATE", chat_format.GO), stops[1]]
    found = parsed(chat_format.modelfile("model.gguf", "</s>", renders_chats=False))
    assert found[1:] == [("PARAMETER", "</s>"), ("TEMPLATE", "{{ .Prompt }}")]


def test_ollamas_template_in_its_language(tmp_path):
    go = shutil.which("go")
    if go is None:
        pytest.skip("needs go")
    # With what Ollama passes: fields of messages by name, missing keys as zero.
    (tmp_path / "main.go").write_text(
        """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var requested struct {
		Template string
		Chats    [][]*Message
	}
	json.NewDecoder(os.Stdin).Decode(&requested)
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(requested.Template))
	texts := []string{}
	for _, chat := range requested.Chats {
		var text strings.Builder
		if err := parsed.Execute(&text, map[string]any{"Messages": chat}); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""
    )
    chats = [messages_of(turns) for turns, _ in CHATS.values()]
    done = subprocess.run(
        [go, "run", "main.go"],
        input=json.dumps({"Template": chat_format.GO, "Chats": chats}).encode(),
        capture_output=True,
        check=True,
        cwd=tmp_path,
    )
    assert json.loads(done.stdout) == [text for _, text in CHATS.values()]
