"""Rows of the three formats as samples of the four kinds that objectives train on.

    alpaca      {"instruction", "input", "output"}, history as [question, answer] pairs, or {"text"} for plain text
    sharegpt    {"conversations": [{"from": "human" | "gpt" | "function_call" | "observation" | "system", "value"}]}
    openai      {"messages": [{"role", "content", "tool_calls"}]}

    stage sft, ppo   Dialogue     messages
    stage pt         Document     text
    stage rm, dpo    Preference   messages, and two last answers: ``ranking: true``, columns chosen and rejected
    stage kto        Feedback     messages, and whether the last answer is desirable: column kto_tag

Messages have the form that chat templates take: {"role", "content"}; an answer that calls tools has "tool_calls":
[{"type": "function", "function": {"name", "arguments"}}], the result the role "tool". A row that doesn't fit is a
``BadRow``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fuselora.engine.data_info import DatasetInfo
from fuselora.engine.data_rows import UNPARSABLE, BadRow, Row, problem
from fuselora.engine.errors import UserError, expected

Message = dict[str, Any]
Conversation = list[Message]
Tools = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation that ends with an answer."""

    messages: Conversation
    tools: Tools | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class Preference:
    """A conversation up to a question, a better and a worse answer to it."""

    prompt: Conversation
    chosen: Message
    rejected: Message
    tools: Tools | None = None


@dataclass(frozen=True, slots=True)
class Feedback:
    """A conversation whose last answer was judged."""

    messages: Conversation
    desirable: bool
    tools: Tools | None = None


Sample = Dialogue | Document | Preference | Feedback


def conversation(sample: Sample) -> Conversation | None:
    """The messages of a sample up to an answer; none of plain text."""
    if isinstance(sample, Document):
        return None
    return [*sample.prompt, sample.chosen] if isinstance(sample, Preference) else sample.messages


def check_stage(info: DatasetInfo, stage: str) -> None:
    """Refuse a set that can't serve ``stage``, before its rows are read."""
    if (stage in ("rm", "dpo")) != info.ranking:
        want = "ranking: true with columns chosen and rejected" if not info.ranking else "no ranking"
        raise expected(f"dataset {info.name}", f"{want} for stage {stage}", f"ranking: {info.ranking}", "change one")
    if stage == "pt" and info.formatting != "alpaca":
        raise expected(f"dataset {info.name}", "formatting alpaca for stage pt", info.formatting, "name a text column")
    if stage == "kto" and "kto_tag" not in info.columns:
        raise expected(f"dataset {info.name}", "a column kto_tag for stage kto", "none", "name it in columns")


def to_sample(row: Row, info: DatasetInfo, stage: str, place: str, default_system: str | None = None) -> Sample:
    """``row`` as a sample for ``stage``.

    Raises:
        BadRow: it doesn't fit its format; the message begins with ``place``.
        UserError: it holds what can't be trained on yet.
    """
    for kind in ("images", "videos", "audios"):
        if kind in info.columns and row.get(info.columns[kind]):
            raise UserError(
                f"{place}: expected text alone, got {kind}; models of several modalities do not train here yet, so "
                f"remove such rows or the {kind} of the columns of {info.name!r}"
            )
    reader = _Reader(row, info, place)
    if stage == "pt":
        return Document(reader.prompt())
    messages = reader.alpaca() if info.formatting == "alpaca" else reader.messages()
    system = reader.text("system") or default_system
    if system and messages[:1] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools = reader.tools()
    if info.ranking:
        reader.check_order(messages, last="user")
        return Preference(messages, reader.answer("chosen"), reader.answer("rejected"), tools)
    if info.formatting == "alpaca":
        messages.append({"role": "assistant", "content": reader.required("response")})
    reader.check_order(messages, last="assistant")
    return Feedback(messages, reader.judgement(), tools) if stage == "kto" else Dialogue(messages, tools)


@dataclass(frozen=True)
class _Reader:
    """The columns of one row under their standard names; every failure is a BadRow with its place."""

    row: Row
    info: DatasetInfo
    place: str

    def bad(self, want: str, got: object, remedy: str = "") -> BadRow:
        remedy = remedy or f"correct the row or the columns of {self.info.name!r} in dataset_info.json"
        return BadRow(str(expected(self.place, want, got, remedy)))

    def value(self, column: str) -> Any:
        name = self.info.columns.get(column)
        return self.row.get(name) if name else None

    def text(self, column: str) -> str:
        """The text of an optional column; empty if there is none."""
        value = self.value(column)
        if value is not None and not isinstance(value, str):
            raise self.bad(f"text in {self.info.columns[column]!r}", f"a {type(value).__name__}")
        return value or ""

    def required(self, column: str) -> str:
        if self.value(column) is None:
            got = "only " + (", ".join(map(repr, self.row)) or "no columns")
            raise self.bad(f"column {self.info.columns.get(column) or column!r}", got)
        return self.text(column)

    def prompt(self) -> str:
        question, query = self.required("prompt"), self.text("query")
        return f"{question}\n{query}" if question and query else question or query

    def alpaca(self) -> Conversation:
        """History and question."""
        messages: Conversation = []
        history = self.value("history") or ()
        if not isinstance(history, (list, tuple)):
            raise self.bad("history as [question, answer] pairs", _short(history), "correct the row")
        for turn in history:
            if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(part, str) for part in turn):
                raise self.bad("history as [question, answer] pairs", _short(turn), "correct the row")
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        return [*messages, {"role": "user", "content": self.prompt()}]

    def messages(self) -> Conversation:
        name, turns = self.info.columns.get("messages", "messages"), self.value("messages")
        if isinstance(turns, str):  # CSV has no lists
            turns = self._json(turns, f"a list of messages in column {name!r}")
        if not isinstance(turns, (list, tuple)) or not turns:
            got = "only " + (", ".join(map(repr, self.row)) or "no columns") if turns is None else _short(turns)
            raise self.bad(f"a list of messages in column {name!r}", got, "correct the row or the columns")
        return [self.message(turn) for turn in turns]

    def message(self, turn: Any) -> Message:
        tags = self.info.tags
        if not isinstance(turn, dict):
            raise self.bad("a message", _short(turn), "correct the row")
        roles = {tags[f"{role}_tag"]: role for role in ("user", "assistant", "function", "observation", "system")}
        role, content = turn.get(tags["role_tag"]), turn.get(tags["content_tag"])
        meaning = roles.get(role) or {"tool": "observation"}.get(role) if isinstance(role, str) else None
        if meaning is None:
            raise self.bad(f"{tags['role_tag']!r} one of {', '.join(roles)}", repr(role), "correct the row or the tags")
        if isinstance(content, list):
            content = self.joined(content)
        if calls := turn.get("tool_calls"):
            if not isinstance(calls, list) or meaning != "assistant" or not isinstance(content, (str, type(None))):
                raise self.bad("an assistant's message with a list of tool_calls", _short(turn), "correct the row")
            return {"role": "assistant", "content": content or "", "tool_calls": [self.call(call) for call in calls]}
        if not isinstance(content, str):
            raise self.bad(f"text in {tags['content_tag']!r}", repr(content), "correct the row or the tags")
        if meaning == "function":
            calls = self._json(content, "a tool call as JSON")
            calls = calls if isinstance(calls, list) else [calls]
            return {"role": "assistant", "content": "", "tool_calls": [self.call(call) for call in calls]}
        return {"role": "tool" if meaning == "observation" else meaning, "content": content}

    def joined(self, parts: list[Any]) -> str:
        """OpenAI's lists of parts: text alone."""
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise self.bad("parts of text alone", _short(parts), "remove the others")
        return "".join(map(str, texts))

    def call(self, call: Any) -> dict[str, Any]:
        """{"name", "arguments"}, alone or as "function" of a call, with arguments as an object."""
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise self.bad("a tool call with name and arguments", _short(call), "correct the row")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = self._json(arguments, "arguments of a tool call as JSON")
        return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}

    def tools(self) -> Tools | None:
        tools = self.value("tools")
        if isinstance(tools, str):
            tools = self._json(tools, f"a list of tools in {self.info.columns['tools']!r}") if tools.strip() else None
        if not tools:
            return None
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise self.bad(f"a list of tools in {self.info.columns['tools']!r}", _short(tools), "correct the row")
        return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]

    def answer(self, column: str) -> Message:
        """The chosen or rejected answer: text, a message, or a list that ends with it."""
        value = self.value(column)
        value = value[-1] if isinstance(value, list) and value else value
        if isinstance(value, dict):
            message = self.message(value)
        else:
            message = {"role": "assistant", "content": self.required(column)}
        if message["role"] != "assistant":
            raise self.bad(f"an answer in {self.info.columns[column]!r}", f"a message of role {message['role']}")
        return message

    def judgement(self) -> bool:
        tag = self.value("kto_tag")
        words = {"true": True, "1": True, "false": False, "0": False}
        tag = words.get(tag.lower(), tag) if isinstance(tag, str) else tag
        if not isinstance(tag, bool):
            raise self.bad(f"true or false in {self.info.columns['kto_tag']!r}", repr(tag))
        return tag

    def check_order(self, messages: Conversation, last: str) -> None:
        """[system], then questions and answers in turn; results of tools stand where questions do."""
        roles = [message["role"] for message in messages[messages[0]["role"] == "system" :]]
        turns = [role for i, role in enumerate(roles) if role != "tool" or roles[i - 1 : i] != ["tool"]]
        right = all((role == "assistant") == (i % 2 == 1) for i, role in enumerate(turns)) and "system" not in turns
        if not right or turns[:1] != ["user"] or (turns[-1] == "assistant") != (last == "assistant"):
            got = ", ".join(message["role"] for message in messages)
            raise self.bad(f"user and assistant in turn, ending with {last}", got, "correct the row")

    def _json(self, text: str, want: str) -> Any:
        try:
            return json.loads(text)
        except UNPARSABLE as error:
            raise self.bad(want, f"{text[:60]!r} ({problem(error)})", "correct the row") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
