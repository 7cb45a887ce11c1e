"""Reads chats whose answer begins with a block of reasoning that the model itself wrote.

A template may keep such a block as it is, write it in its own way, or drop it. Where the answer as a whole cannot be
found in the rendering, block and answer are read as two contents with the tags between them, proven like any other. It
raises `PromptError` where neither way is certain.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, TypeAlias, get_args

from tl_persona.errors import InputError, PromptError
from tl_persona.prompts.template import ADVICE, ChatReader, Rendering

Reasoning: TypeAlias = Literal["include", "exclude"]
"""Whether the reasoning that the template shows counts as answer."""

TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)
"""How models open and close a block of reasoning."""

ROLE = "reasoning"
"""Stands for the block among the roles of a chat."""


class Block(NamedTuple):
    """An answer in parts; joined, they are the answer.

    Attributes:
        opened: The opening tag, with the white space behind it.
        reasoning: What stands in the block.
        closed: The closing tag, with the white space around it.
        answer: What follows.
    """

    opened: str
    reasoning: str
    closed: str
    answer: str


def check_reasoning(reasoning: str) -> Reasoning:
    """The choice, if it is one.

    Raises:
        InputError: It is none.
    """
    for choice in get_args(Reasoning):
        if reasoning == choice:
            found: Reasoning = choice
            return found
    raise InputError(f"unknown reasoning {reasoning!r}: choose {' or '.join(get_args(Reasoning))}")


def block_of(answer: str) -> Block | None:
    """The parts of an answer that begins with one block of reasoning; None for any other.

    Example:
        >>> block_of("<think>A or B?</think> A")
        Block(opened='<think>', reasoning='A or B?', closed='</think> ', answer='A')
        >>> block_of("<think></think>A") is None
        True
    """
    for opening, closing in TAGS:
        if answer.count(opening) != 1 or answer.count(closing) != 1:
            continue
        pattern = rf"({re.escape(opening)}\s*)(\S.*?)(\s*{re.escape(closing)}\s*)(\S.*)"
        found = re.fullmatch(pattern, answer.lstrip(), re.DOTALL)
        if found is not None:
            return Block(*found.groups())
    return None


class Read(NamedTuple):
    """A chat as it was read: its roles and contents, which have the reasoning apart where that does not count."""

    roles: tuple[str, ...]
    contents: tuple[str, ...]
    rendering: Rendering


def read_chat(reader: ChatReader, roles: tuple[str, ...], contents: Sequence[str], reasoning: Reasoning) -> Read:
    """The rendering of a chat that ends with an answer.

    Raises:
        PromptError: The template takes no such chat, or where the contents lie cannot be told for certain.
    """
    whole = tuple(contents)
    block = block_of(whole[-1])
    if block is None:
        return Read(roles, whole, reader.read(roles, whole))
    apart = (*roles[:-1], ROLE, roles[-1]), (*whole[:-1], block.reasoning, block.answer)
    glue = block.opened, block.closed
    if reasoning == "exclude":
        try:
            return Read(*apart, reader.read(*apart, glue))
        except PromptError:
            rendering = reader.read(roles, whole)  # a template that drops the block
            if block.closed.strip() in rendering.text[slice(*rendering.ranges[-1])]:
                raise
            return Read(roles, whole, rendering)
    try:
        return Read(roles, whole, reader.read(roles, whole))
    except PromptError as error:
        try:
            rendering = reader.read(*apart, glue)
        except PromptError:
            raise error from None
    return Read(roles, whole, _joined(rendering, block.opened.strip()))


def _joined(rendering: Rendering, opening: str) -> Rendering:
    """A rendering whose last two contents, and the tags that the template wrote with them, are one."""
    layout, text, ranges = rendering
    block, answer = len(layout.roles) - 2, len(layout.roles) - 1
    place = layout.order.index(block)
    before = layout.segments[place]
    tag = before.rfind(opening)
    if layout.order[place + 1] != answer or tag < 0 or before[tag:].strip() != opening:
        raise PromptError(f"the chat template writes something between the tag {opening} and the reasoning: {ADVICE}")
    segments = (*layout.segments[:place], before[:tag], *layout.segments[place + 2 :])
    joined = replace(
        layout,
        roles=(*layout.roles[:block], layout.roles[answer]),
        order=tuple(block if index == answer else index for index in layout.order if index != block),
        segments=segments,
        glue=None,
    )
    start = ranges[block][0] - len(before[tag:])
    return Rendering(joined, text, (*ranges[:block], (start, ranges[answer][1])))
