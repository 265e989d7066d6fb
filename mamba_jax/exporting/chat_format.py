"""The chat format (``generation.chat``) as other engines' templates.

``jinja`` is for transformers, vLLM and llama.cpp, ``GO`` for Ollama. Each renders a chat as
training and the server do; comments and model cards state what an engine cannot do.
"""

import json

from mamba_jax.data.sources.chats import ROLES
from mamba_jax.generation.chat import ANSWER, STOP

_JINJA = """\
{%- set roles = ROLES -%}
{%- set chat = namespace(between='') -%}
{%- for message in messages -%}
    {%- set turn = namespace(text='', between='') -%}
    {%- set content = message['content'] or [] -%}
    {%- set parts = [content] if content is string else content -%}
    {%- for part in parts -%}
        {%- set part = part if part is string else part['text'] -%}
        {%- if part -%}
            {%- set turn.text = turn.text + turn.between + part -%}
            {%- set turn.between = '\\n' -%}
        {%- endif -%}
    {%- endfor -%}
    {%- for call in message['tool_calls'] or [] -%}
        {%- set function = call['function'] or call -%}
        {%- set values = function['arguments'] or {} -%}
        {%- set values = values if values is string else values | tojson(sort_keys=true) -%}
        {%- set named = '{"name": ' + function['name'] | tojson + ', "arguments": ' -%}
        {%- set turn.text = turn.text + turn.between + named + values + '}' -%}
        {%- set turn.between = '\\n' -%}
    {%- endfor -%}
    {%- if turn.text | trim -%}
        {%- set role = message['role'] | trim | lower -%}
        {{- chat.between + roles.get(role, role) + ': ' + turn.text -}}
        {%- set chat.between = '\\n\\n' -%}
    {%- endif -%}
{%- endfor -%}
{%- if not chat.between -%}
    {{- raise_exception('messages hold no text: give at least one with a role and content') -}}
{%- endif -%}
{%- if add_generation_prompt -%}
    {{- '\\n\\nANSWER' -}}
{%- endif -%}"""

# Ollama merges neighbouring messages of one role before the template runs, and has no function that
# detects content that is only white space.
GO = (
    '{{ $between := "" }}{{ range .Messages }}{{ if .Content }}{{ $between }}'
    '{{ if eq .Role "developer" }}system{{ else }}{{ .Role }}{{ end }}: {{ .Content }}'
    f'{{{{ $between = "\\n\\n" }}}}{{{{ end }}}}{{{{ end }}}}{{{{ $between }}}}{ANSWER}'
)


def jinja(*, begins: bool) -> str:
    """Returns the Jinja template.

    Args:
      begins: its text begins with the separator's name, which the engine must turn into the token.
    """
    body = _JINJA.replace("ROLES", json.dumps(ROLES)).replace("ANSWER", ANSWER)
    return ("{{- bos_token -}}\n" if begins else "") + body


def modelfile(model: str, end: str, *, renders_chats: bool) -> str:
    """Returns Ollama's ``Modelfile``.

    Args:
      model: the GGUF file's name.
      end: the separator's name.
      renders_chats: in our format; else prompts are passed on unchanged.
    """
    head, passed_on = f'FROM ./{model}\nPARAMETER stop "{end}"\n', "TEMPLATE {{ .Prompt }}\n"
    if not renders_chats:
        return head + passed_on
    # A quoted value may hold line feeds; Ollama knows no escapes there.
    return (
        f"{head}# Chats are rendered as in training. For a model that was not trained on\n"
        f"# chats, replace everything below by: {passed_on}"
        f'TEMPLATE """{GO}"""\nPARAMETER stop """{STOP}"""\n'
    )


def notes(
    library: str, end: str, *, is_ours: bool, begins: bool = True, keeps_text: bool = True
) -> str:
    """Returns what the model card states about chats and special tokens.

    Args:
      library: "transformers", "gguf" or "onnx".
      end: the separator's name.
      is_ours: the template is ours, not that of an imported model.
      begins: the template's text begins with the separator.
      keeps_text: the library tokenizers can keep a typed separator as text.
    """
    if not is_ours:
        return _OWN_TEMPLATE
    text = _CHAT + _IN_LIBRARY[library]
    text += ("" if begins else _SEPARATOR_IS_MISSING) + ("" if keeps_text else _TYPED_IS_A_TOKEN)
    return text.format(answer=ANSWER, stop=json.dumps(STOP), end=end)


_OWN_TEMPLATE = """\
## Chat
The chat template of the model that this one was imported from is copied here unchanged. mamba_jax
neither renders nor checks it. Names of special tokens in a text become these tokens, because such
a template may need it.
"""
_CHAT = """\
## Chat
A chat is text: `role: content` for each turn, a blank line between two turns; then the model
answers after `{answer}`. An answer ends with {end}, or where the model begins the user's next
turn: pass {stop} as a stop string. The space after `{answer}` is part of the answer. A model
that was not trained on chats continues the text and does not answer.

"""
_IN_LIBRARY = {
    "transformers": """\
`tokenizer.apply_chat_template` renders chats, and so does the text-generation pipeline:
`pipe(messages, stop_sequence={stop})`, whose answers include the stop. The stop is not part of
`generation_config.json`, because `generate` then refuses to run without a tokenizer.

## Special tokens
The name of a special token in a text, {end} included, stays text, as in training
(`split_special_tokens`); pass `split_special_tokens=False` to get the token itself. Only at the
start of a rendered chat {end} is the token. Batches are padded on the left.
""",
    "gguf": """\
llama.cpp renders chats with the template in the file; pass the stop with each request. The
`Modelfile` has the template and the stop for Ollama, which joins neighbouring messages of one role.

## Special tokens
llama.cpp and Ollama turn the name of a special token in a prompt or a message into this token,
{end} included, which was text in training. Where users type prompts, remove such names, or encode
with llama.cpp's `/tokenize` and `"parse_special": false` and send the ids.
""",
    "onnx": """\
`tokenizer_config.json` has a chat template for transformers' `AutoTokenizer`.

## Special tokens
The name of a special token in a text, {end} included, is text in training. The library tokenizers
keeps it so after `tokenizer.encode_special_tokens = True`, as in the example program.
""",
}
_SEPARATOR_IS_MISSING = """\
With this tokenizer, `apply_chat_template` cannot put {end} before a chat, as training does before
every text. Encode the rendered text instead:
`tokenizer(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))`.
"""
_TYPED_IS_A_TOKEN = """\
This tokenizer is an exception: its vocabulary has {end} as an ordinary word, so a text that spells
it gives the token. Remove it from text that users type.
"""
