"""Chat templates in the shapes that common model families use, written here from how those behave.

Like `templates`, where the behaviours are shown one at a time: each beside a Python account of what it must render.
"""

from templates import DEFAULT_SYSTEM, Behaviour, Pieces, Turns

_LLAMA3 = (
    "<|begin_of_text|>{% if date_string is not defined %}{% set date_string = strftime_now('%Y') %}{% endif %}"
    "{% set rest = messages %}{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}{% set rest = messages[1:] %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nLearned until: 2023\nNow: {{ date_string }}\n\n"
    "{{ system }}<|eot_id|>"
    "{% for m in rest %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def _llama3(turns: Turns) -> Pieces:
    opening = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nLearned until: 2023\nNow: 1 May\n\n"
    pieces: Pieces = [(opening, None)]
    if turns[0][0] == "system":
        pieces.append((turns[0][1].strip(), 0))
    pieces.append(("<|eot_id|>", None))
    for index, (role, text) in enumerate(turns):
        if role != "system":
            header = f"<|start_header_id|>{role}<|end_header_id|>\n\n"
            pieces += [(header, None), (text.strip(), index), ("<|eot_id|>", None)]
    return pieces


_GEMMA3 = (
    "{{ bos_token }}{% set first = '' %}{% set rest = messages %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ first if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
)


def _gemma3(turns: Turns) -> Pieces:
    pieces: Pieces = [("<s>", None)]
    system: Pieces = []
    for index, (role, text) in enumerate(turns):
        if role == "system":
            system = [(text, index), ("\n\n", None)]
            continue
        name = "model" if role == "assistant" else "user"
        pieces += [(f"<start_of_turn>{name}\n", None), *system, (text.strip(), index), ("<end_of_turn>\n", None)]
        system = []
    return pieces


_QWEN3 = (
    "{% set ns = namespace(query=messages | length - 1, looking=true) %}"
    "{% for m in messages[::-1] %}{% if ns.looking and m['role'] == 'user' and not "
    "(m['content'].startswith('<tool_response>') and m['content'].endswith('</tool_response>')) %}"
    "{% set ns.query = messages | length - 1 - loop.index0 %}{% set ns.looking = false %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set thought = '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.query and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ text.lstrip('\n') }}{% else %}{{ text }}{% endif %}"
    "{% else %}{{ text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def _qwen3(turns: Turns) -> Pieces:
    query = len(turns) - 1
    for index, (role, text) in enumerate(turns):
        answered = text.startswith("<tool_response>") and text.endswith("</tool_response>")
        if role == "user" and not answered:
            query = index
    pieces: Pieces = []
    for index, (role, text) in enumerate(turns):
        thought, said = "", text
        if role == "assistant" and "</think>" in text:
            thought = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            said = text.split("</think>")[-1].lstrip("\n")
        pieces.append((f"<|im_start|>{role}\n", None))
        if role == "assistant" and index > query and (index == len(turns) - 1 or thought):
            stripped = thought.strip("\n")
            pieces.append((f"<think>\n{stripped}\n</think>\n\n", None))
            said = said.lstrip("\n")
        pieces += [(said, index), ("<|im_end|>\n", None)]
    return pieces


_MISTRAL = (
    "{{ bos_token }}{% set rest = messages %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}{% endif %}"
    "{% set asked = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "[INST] {% if system is defined and m == asked[-1] %}{{ system }}\n\n{% endif %}{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


def _mistral(turns: Turns) -> Pieces:
    """The system prompt stands before the last question, and before an earlier one that reads the same."""
    pieces: Pieces = [("<s>", None)]
    last = [text for role, text in turns if role == "user"][-1]
    for index, (role, text) in enumerate(turns):
        if role == "user":
            repeated = [(turns[0][1], 0), ("\n\n", None)] if turns[0][0] == "system" and text == last else []
            pieces += [("[INST] ", None), *repeated, (text, index), ("[/INST]", None)]
        elif role == "assistant":
            pieces += [(" ", None), (text.strip(), index), ("</s>", None)]
    return pieces


_MISTRAL_AT_THE_END = _MISTRAL.replace("m == asked[-1]", "loop.last")
"""Looks for the user's turn in the last message, which is the answer's: the system prompt is never rendered."""


def _mistral_at_the_end(turns: Turns) -> Pieces:
    pieces: Pieces = [("<s>", None)]
    system: Pieces = []
    for index, (role, text) in enumerate(turns):
        if role == "system":
            system = [(text, index), ("\n\n", None)]
        elif role == "user":
            pieces += [("[INST] ", None), *system, (text, index), ("[/INST]", None)]
            system = []
        else:
            pieces += [(" ", None), (text.strip(), index), ("</s>", None)]
    return pieces


_MISTRAL_TAGGED = (
    "<s>{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ m['content'] }}[/SYSTEM_PROMPT]"
    "{% elif m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
)


def _mistral_tagged(turns: Turns) -> Pieces:
    around = {
        "system": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "user": ("[INST]", "[/INST]"),
        "assistant": ("", "</s>"),
    }
    pieces: Pieces = [("<s>", None)]
    for index, (role, text) in enumerate(turns):
        before, after = around[role]
        pieces += [(before, None), (text, index), (after, None)]
    return pieces


_DEEPSEEK = (
    "<｜begin▁of▁sentence｜>{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<｜Assistant｜>{% set text = m['content'] %}"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}{{ text }}"
    "<｜end▁of▁sentence｜>{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


def _deepseek(turns: Turns) -> Pieces:
    pieces: Pieces = [("<｜begin▁of▁sentence｜>", None)]
    for index, (role, text) in enumerate(turns):
        if role == "assistant":
            said = text.split("</think>")[-1]
            pieces += [("<｜Assistant｜>", None), (said, index), ("<｜end▁of▁sentence｜>", None)]
        else:
            pieces += [("<｜User｜>" if role == "user" else "", None), (text, index)]
    return pieces


_PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


def _phi(turns: Turns) -> Pieces:
    pieces: Pieces = []
    for index, (role, text) in enumerate(turns):
        pieces += [(f"<|{role}|>\n", None), (text, index), ("<|stop|>\n", None)]
    return [*pieces, ("</s>", None)]


_PHI4 = "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>{% endfor %}"


def _phi4(turns: Turns) -> Pieces:
    pieces: Pieces = []
    for index, (role, text) in enumerate(turns):
        pieces += [(f"<|im_start|>{role}<|im_sep|>", None), (text, index), ("<|im_end|>", None)]
    return pieces


_VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set rest = messages[1:] %}"
    f"{{% else %}}{DEFAULT_SYSTEM}{{% set rest = messages %}}{{% endif %}}"
    "{% for m in rest %}{% if m['role'] == 'user' %} USER: {{ m['content'] }}"
    "{% else %} ASSISTANT: {{ m['content'] }}</s>{% endif %}{% endfor %}"
)


def _vicuna(turns: Turns) -> Pieces:
    around = {"system": ("", ""), "user": (" USER: ", ""), "assistant": (" ASSISTANT: ", "</s>")}
    pieces: Pieces = [] if turns[0][0] == "system" else [(DEFAULT_SYSTEM, None)]
    for index, (role, text) in enumerate(turns):
        before, after = around[role]
        pieces += [(before, None), (text, index), (after, None)]
    return pieces


_ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n"
    "{% else %}### Response:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
)


def _alpaca(turns: Turns) -> Pieces:
    tags = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
    pieces: Pieces = []
    for index, (role, text) in enumerate(turns):
        pieces += [(tags[role], None), (text, index), ("\n\n", None)]
    return pieces


_HARMONY = (
    "<|start|>system<|message|>You answer chats.\nReasoning: {{ reasoning_effort }}<|end|>"
    "{% set rest = messages %}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "<|start|>developer<|message|># Instructions\n\n{{ messages[0]['content'] }}\n\n<|end|>{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}<|start|>user<|message|>{{ m['content'] }}<|end|>{% else %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% endif %}{% endfor %}"
)


def _harmony(turns: Turns) -> Pieces:
    pieces: Pieces = [("<|start|>system<|message|>You answer chats.\nReasoning: low<|end|>", None)]
    for index, (role, text) in enumerate(turns):
        if role == "system":
            opening, close = "<|start|>developer<|message|># Instructions\n\n", "\n\n<|end|>"
        elif role == "user":
            opening, close = "<|start|>user<|message|>", "<|end|>"
        else:
            opening = "<|start|>assistant<|channel|>final<|message|>"
            close = "<|return|>" if index == len(turns) - 1 else "<|end|>"
        pieces += [(opening, None), (text, index), (close, None)]
    return pieces


FAMILIES = (
    Behaviour("llama3", _LLAMA3, _llama3, kwargs=(("date_string", "1 May"),)),
    Behaviour("gemma3", _GEMMA3, _gemma3),
    Behaviour("qwen3", _QWEN3, _qwen3),
    Behaviour("qwen3_without_thinking", _QWEN3, _qwen3, kwargs=(("enable_thinking", False),)),
    Behaviour("mistral", _MISTRAL, _mistral),
    Behaviour("mistral_at_the_end", _MISTRAL_AT_THE_END, _mistral_at_the_end, folds=True),
    Behaviour("mistral_tagged", _MISTRAL_TAGGED, _mistral_tagged),
    Behaviour("deepseek", _DEEPSEEK, _deepseek),
    Behaviour("phi", _PHI, _phi),
    Behaviour("phi4", _PHI4, _phi4),
    Behaviour("vicuna", _VICUNA, _vicuna),
    Behaviour("alpaca", _ALPACA, _alpaca),
    Behaviour("harmony", _HARMONY, _harmony, kwargs=(("reasoning_effort", "low"),)),
)
