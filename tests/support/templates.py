"""Small chat templates of our own, one a behaviour, each beside a Python account of what it must render.

The account (`expected`) is the oracle: it says, without reading the template, which text comes out and where every
content lies in it. It is written for people to compare with the template by eye. Nothing here knows the package.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Turns = Sequence[tuple[str, str]]
"""Role and content of every message, a system message first if there is one."""

Pieces = list[tuple[str, int | None]]
"""Rendered text, piece by piece: what the template writes (None), or what is left of content i."""

DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Behaviour:
    """A template and what it does.

    Attributes:
        name: For test ids.
        template: Jinja, or several by name.
        expected: What must be rendered for some messages; the system prompt is in front of the question where folded.
        folds: True where the template takes no system message.
        kwargs: Keywords passed to the template.
        unless_there: What it writes behind contents that have it not, so that nobody can tell whose it is.
    """

    name: str
    template: str | dict[str, str]
    expected: Callable[[Turns], Pieces]
    folds: bool = False
    kwargs: tuple[tuple[str, object], ...] = ()
    unless_there: str = ""


def in_text(pieces: Pieces) -> tuple[str, dict[int, tuple[int, int]]]:
    """The whole text, and the range of every content in it."""
    text, ranges = "", {}
    for piece, content in pieces:
        if content is not None:
            ranges[content] = (len(text), len(text) + len(piece))
        text += piece
    return text, ranges


def _folded(turns: Turns, strip: bool = True) -> list[tuple[str, Pieces]]:
    """Turns for a template without a system role: the system prompt and a blank line before the first question."""
    numbered = [(role, [(text, index)]) for index, (role, text) in enumerate(turns)]
    if turns[0][0] == "system":
        (_, system), (role, question), *rest = numbered
        numbered = [(role, [*system, ("\n\n", None), *question]), *rest]
    return [(role, _stripped(pieces)) for role, pieces in numbered] if strip else numbered


def _stripped(pieces: Pieces) -> Pieces:
    (first, index), *rest = pieces
    pieces = [(first.lstrip(), index), *rest]
    *rest, (last, index) = pieces
    return [*rest, (last.rstrip(), index)]


_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def _chatml(turns: Turns, keep: Callable[[str], str] = str) -> Pieces:
    pieces: Pieces = []
    for index, (role, text) in enumerate(turns):
        pieces += [(f"<|im_start|>{role}\n", None), (keep(text), index), ("<|im_end|>\n", None)]
    return pieces


_CHATML_DEFAULT = (
    f"{{% if messages[0]['role'] != 'system' %}}<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n{{% endif %}}{_CHATML}"
)


def _chatml_default(turns: Turns) -> Pieces:
    default = f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    return [*([] if turns[0][0] == "system" else [(default, None)]), *_chatml(turns)]


_GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}"
)


def _gemma(turns: Turns) -> Pieces:
    pieces: Pieces = [("<s>", None)]
    for role, texts in _folded(turns):
        name = "model" if role == "assistant" else role
        pieces += [(f"<start_of_turn>{name}\n", None), *texts, ("<end_of_turn>\n", None)]
    return pieces


_SILENT = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] }}: {{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
)


def _silent(turns: Turns) -> Pieces:
    pieces: Pieces = []
    for role, texts in _folded(turns, strip=False):
        pieces += [(f"{role}: ", None), *texts, ("</s>", None)]
    return pieces


_INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def _inst(turns: Turns) -> Pieces:
    pieces: Pieces = [("<s>", None)]
    for role, texts in _folded(turns, strip=False):
        if role == "user":
            pieces += [("[INST] ", None), *texts, (" [/INST]", None)]
        else:
            pieces += [(" ", None), *_stripped(texts), ("</s>", None)]
    return pieces


_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% if not rest or rest[0]['role'] != 'user' %}{{ raise_exception('A user turn must follow') }}{% endif %}"
    "{% else %}{% set rest = messages %}{% set head = '' %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "<s>[INST] {{ (head if loop.first else '') + m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} </s>{% endif %}{% endfor %}"
)


def _llama2(turns: Turns) -> Pieces:
    pieces: Pieces = []
    head: Pieces = []
    for index, (role, text) in enumerate(turns):
        if role == "system":
            head = [("<<SYS>>\n", None), (text, index), ("\n<</SYS>>\n\n", None)]
        elif role == "user":
            pieces += [("<s>[INST] ", None), *head, (text.strip(), index), (" [/INST]", None)]
            head = []
        else:
            pieces += [(" ", None), (text.strip(), index), (" </s>", None)]
    return pieces


_THINK_ADDED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{{ m['content'].lstrip('\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)


def _think_added(turns: Turns) -> Pieces:
    pieces = _chatml(turns[:-1])
    role, text = turns[-1]
    return [
        *pieces,
        (f"<|im_start|>{role}\n<think>\n\n</think>\n\n", None),
        (text.lstrip("\n"), len(turns) - 1),
        ("<|im_end|>\n", None),
    ]


_THINK_ADDED_IF_ABSENT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '<think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def _think_added_if_absent(turns: Turns) -> Pieces:
    pieces: Pieces = []
    for index, (role, text) in enumerate(turns):
        block = "<think>\n\n</think>\n\n" if role == "assistant" and "<think>" not in text else ""
        pieces += [(f"<|im_start|>{role}\n{block}", None), (text, index), ("<|im_end|>\n", None)]
    return pieces


_THINK_REMOVED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% else %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
)


def _think_removed(turns: Turns) -> Pieces:
    pieces: Pieces = [("<s>", None)]
    for index, (role, text) in enumerate(turns):
        if role == "assistant":
            pieces += [("<|Assistant|>", None), (text.split("</think>")[-1], index), ("<|end|>", None)]
        else:
            pieces += [("<|User|>" if role == "user" else "", None), (text, index)]
    return pieces


_THINK_PARSED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' %}"
    "{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}"
    "{% else %}{{ content }}{% endif %}<|im_end|>\n{% endfor %}"
)


def _think_parsed(turns: Turns) -> Pieces:
    pieces: Pieces = []
    for index, (role, text) in enumerate(turns):
        thought = ""
        if role == "assistant" and "</think>" in text:
            thought = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n").strip("\n")
            text = text.split("</think>")[-1].lstrip("\n")
        pieces.append((f"<|im_start|>{role}\n", None))
        if role == "assistant" and index == len(turns) - 1:
            pieces.append((f"<think>\n{thought}\n</think>\n\n", None))
            text = text.lstrip("\n")
        pieces += [(text, index), ("<|im_end|>\n", None)]
    return pieces


_HEADER = (
    "{{ bos_token }}<|im_start|>system\nCutting knowledge: {{ date_string }}\n"
    "{% if tools %}Tools: {% for tool in tools %}{{ tool['function']['name'] }};{% endfor %}"
    "{{ '\n' }}{% endif %}{{ '\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}<|im_end|>"
    "{% for m in rest %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "assistant", "description": "user", "parameters": {}}}]


def _header(turns: Turns) -> Pieces:
    pieces: Pieces = [("<s><|im_start|>system\nCutting knowledge: 01 Feb 2003\nTools: assistant;\n\n", None)]
    for index, (role, text) in enumerate(turns):
        if role == "system":
            pieces += [(text.strip(), index)]
    pieces.append(("<|im_end|>", None))
    for index, (role, text) in enumerate(turns):
        if role != "system":
            pieces += [(f"<|im_start|>{role}\n\n", None), (text.strip(), index), ("<|im_end|>", None)]
    return pieces


_SWITCH = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{% elif m['role'] == 'assistant' %}<|Assistant|>"
    "{% endif %}"
    "{{ '/think ' if enable_thinking and m['role'] == 'user' else '' }}{{ m['content'].rstrip() }}<|end|>{% endfor %}"
)


def _switch(turns: Turns) -> Pieces:
    opening = {"system": "", "user": "<|User|>/think ", "assistant": "<|Assistant|>"}
    pieces: Pieces = []
    for index, (role, text) in enumerate(turns):
        pieces += [(opening[role], None), (text.rstrip(), index), ("<|end|>", None)]
    return pieces


_FLAG_AND_THINK_REMOVED = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n"
    "{% elif m['role'] == 'user' %}USER: {{ m['content'].replace('/think', '') }} "
    "{% else %}ASSISTANT: {{ m['content'].split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
)


def _flag_and_think_removed(turns: Turns) -> Pieces:
    pieces: Pieces = []
    for index, (role, text) in enumerate(turns):
        if role == "system":
            pieces += [(text, index), ("\n", None)]
        elif role == "user":
            pieces += [("USER: ", None), (text.replace("/think", ""), index), (" ", None)]
        else:
            pieces += [("ASSISTANT: ", None), (text.split("</think>")[-1], index), ("</s>", None)]
    return pieces


_BREAK_ADDED_IF_ABSENT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{{ '\n' if not m['content'].endswith('\n') }}<|im_end|>{% endfor %}"
)


def _break_added_if_absent(turns: Turns) -> Pieces:
    pieces: Pieces = []
    for index, (role, text) in enumerate(turns):
        added = "" if text.endswith("\n") else "\n"
        pieces += [(f"<|im_start|>{role}\n", None), (text, index), (f"{added}<|im_end|>", None)]
    return pieces


_AS_JSON = _CHATML.replace("m['content']", "m['content'] | tojson")
_LINES_JOINED = _CHATML.replace("m['content']", "m['content'].replace('\n', ' ')")
_CUT_AT_THIRTY = _CHATML.replace("m['content']", "m['content'][:30]")
_QUOTES_STRIPPED = _CHATML.replace("m['content']", "m['content'].strip('\"')")
_GENERATION = _CHATML.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")


def _as_json(turns: Turns) -> Pieces:
    pieces: Pieces = []
    for index, (role, text) in enumerate(turns):
        written = json.dumps(text, ensure_ascii=False)[1:-1]
        pieces += [(f'<|im_start|>{role}\n"', None), (written, index), ('"<|im_end|>\n', None)]
    return pieces


BEHAVIOURS = (
    Behaviour("content_as_it_is", _CHATML, _chatml),
    Behaviour(
        "content_trimmed", _CHATML.replace("m['content']", "m['content'] | trim"), lambda t: _chatml(t, str.strip)
    ),
    Behaviour("default_system", _CHATML_DEFAULT, _chatml_default),
    Behaviour("system_refused", _GEMMA, _gemma, folds=True),
    Behaviour("system_dropped", _SILENT, _silent, folds=True),
    Behaviour("brackets", _INST, _inst, folds=True),
    Behaviour("system_in_user_turn", _LLAMA2, _llama2),
    Behaviour("think_added", _THINK_ADDED, _think_added),
    Behaviour("think_added_if_absent", _THINK_ADDED_IF_ABSENT, _think_added_if_absent),
    Behaviour("think_removed", _THINK_REMOVED, _think_removed),
    Behaviour("think_parsed", _THINK_PARSED, _think_parsed),
    Behaviour("header", _HEADER, _header, kwargs=(("date_string", "01 Feb 2003"), ("tools", TOOLS))),
    Behaviour("keyword", _SWITCH, _switch, kwargs=(("enable_thinking", True),)),
    Behaviour("named", {"default": _CHATML, "rag": "{{ raise_exception('not this one') }}"}, _chatml),
    Behaviour("flag_and_think_removed", _FLAG_AND_THINK_REMOVED, _flag_and_think_removed),
    Behaviour("break_added_if_absent", _BREAK_ADDED_IF_ABSENT, _break_added_if_absent, unless_there="\n"),
    Behaviour("content_as_json", _AS_JSON, _as_json),
    Behaviour("lines_joined", _LINES_JOINED, lambda t: _chatml(t, lambda text: text.replace("\n", " "))),
    Behaviour("cut_at_thirty", _CUT_AT_THIRTY, lambda t: _chatml(t, lambda text: text[:30])),
    Behaviour("quotes_stripped", _QUOTES_STRIPPED, lambda t: _chatml(t, lambda text: text.strip('"'))),
    Behaviour("generation_block", _GENERATION, _chatml),
    Behaviour("named_by_keyword", {"rag": _CHATML, "b": _INST}, _chatml, kwargs=(("chat_template", "rag"),)),
)

UNREADABLE = {
    "repeated": "{% for m in messages %}{{ m['content'] }}|{{ m['content'] }}{% endfor %}",
    "reordered": "{% for m in messages | reverse %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    "upper_case": "{% for m in messages %}<|im_start|>{{ m['content'] | upper }}<|im_end|>{% endfor %}",
    "answer_dropped": "{% for m in messages[:-1] %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    "letters_spread": "{% for m in messages %}{% for c in m['content'] %}{{ c }} {% endfor %}{% endfor %}",
    "a_content_in_parts": "{% for m in messages %}{{ m['content'] | map(attribute='text') | join }}{% endfor %}",
    "system_after_the_question": (
        "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['content'] }}<|im_end|>"
        "{% if m['role'] == 'user' %}{{ messages[0]['content'] }}{% endif %}{% endfor %}"
    ),
    "always_raises": "{{ raise_exception('no chats here') }}",
}
"""Templates around whose contents there is no fixed structure: always refused."""
