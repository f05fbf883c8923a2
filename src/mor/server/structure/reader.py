"""Calls of functions in an answer, found while it grows."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mor.server.structure.forms import Form

_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_LONGEST_HEAD = 512


@dataclass(frozen=True)
class Piece:
    """What an answer grew by.

    Attributes:
        text: more of the content, or of the arguments of a call.
        call: which call it belongs to; None for content.
        name: the function, in a call's first piece.
    """

    text: str
    call: int | None = None
    name: str | None = None


class CallReader:
    """Tells content and calls apart; a whole text and the same text in pieces give the same.

    A call whose function is not known, or that is no JSON, stays content. A call is reported as
    soon as its name is known and its arguments begin; one that writes its arguments first is
    reported at its end.

    Args:
        form: how calls are written.
        names: functions that there are.
        several: whether calls after the first one count; they are left out if not.
    """

    def __init__(self, form: Form, names: Collection[str], several: bool = True) -> None:
        self.form, self.names, self.several = form, names, several
        self.calls = 0
        self._buffer = self._skipped = ""
        self._state = self._find_call if form.begin else self._see_start
        self._out: list[Piece] = []
        self._depth = self._scanned = 0
        self._in_text = self._escaped = self._over = False

    def feed(self, text: str, over: bool = False) -> list[Piece]:
        """Add text.

        Args:
            text: what the answer grew by.
            over: whether that was all.

        Returns:
            What is certain now.
        """
        self._buffer += text
        self._over = over
        before = None
        while (self._buffer or over) and before != (self._state, self._buffer):
            before = (self._state, self._buffer)
            self._state()
        out, self._out = self._out, []
        return out

    def _cut(self, end: int) -> str:
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        return text

    def _cut_all(self) -> str:
        return self._cut(len(self._buffer))

    # Content -------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if text:
            self._out.append(Piece(text))

    def _pass_on(self) -> None:
        self._say(self._cut_all())

    def _find_call(self) -> None:
        """Content up to the next call; what may become its mark is held back."""
        begin = self.form.begin
        place = self._buffer.find(begin)
        if place >= 0:
            self._say(self._cut(place).rstrip())  # white space beside a call belongs to nobody
            self._cut(len(begin))
            self._scanned, self._state = 0, self._read_head
        elif self._over:
            self._pass_on()
        else:
            held = self._buffer
            lengths = range(len(begin) - 1, 0, -1)
            length = next((n for n in lengths if held.endswith(begin[:n])), 0)
            self._say(self._cut(len(held[: len(held) - length].rstrip())))

    def _skip_space(self) -> None:
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._state = self._find_call

    def _see_start(self) -> None:
        """Whether the answer is calls at all, where these have no mark of their own."""
        start = self._buffer.lstrip()
        if not start:
            if self._over:
                self._pass_on()
            return
        opened = bool(self.form.opening) and start[0] == self.form.opening
        if opened or start[0] == "{":
            self._skipped = self._cut(len(self._buffer) - len(start) + opened)
            self._state = self._read_head
        else:
            self._state = self._pass_on

    # Calls ---------------------------------------------------------------------------------------

    def _read_head(self) -> None:
        """The name, and the beginning of the arguments."""
        head = self._buffer[:_LONGEST_HEAD]
        found = _HEAD.match(head)
        name = None if found is None else _text_of(found[1])
        if found is not None and name is not None and name in self.names:
            self._cut(found.end())
            self._begin(name)
            self._depth, self._state = 0, self._read_arguments
        elif self.form.end:
            self._read_marked()
        elif _is_no_call(head, self.names):
            self._give_up()
        elif self._over:
            self._read_rest()

    def _give_up(self) -> None:
        """It was no call."""
        self._buffer = self._skipped + self._buffer
        self._state = self._pass_on

    def _begin(self, name: str) -> None:
        self.calls += 1
        self._skipped = ""
        self._tell("", name)

    def _tell(self, text: str, name: str | None = None) -> None:
        if (text or name is not None) and (self.several or self.calls == 1):
            self._out.append(Piece(text, self.calls - 1, name))

    def _read_marked(self) -> None:
        """A call in another order: all of it, once its end is there."""
        end = self.form.end
        place = self._buffer.find(end, max(0, self._scanned - len(end)))
        self._scanned = len(self._buffer)
        if place < 0 and not self._over:
            return
        raw = self._cut_all() if place < 0 else self._cut(place)
        closing = "" if place < 0 else self._cut(len(end))
        try:
            told = self._tell_whole(json.loads(raw, strict=False))
        except (ValueError, RecursionError):
            told = False
        if told:
            self._state = self._skip_space
        else:
            self._say(self.form.begin + raw + closing)
            self._state = self._find_call

    def _read_rest(self) -> None:
        """The same where nothing marks the end: the text is over."""
        try:
            call, end = json.JSONDecoder(strict=False).raw_decode(self._buffer.lstrip())
        except (ValueError, RecursionError):
            call, end = None, 0
        if self._tell_whole(call):
            self._buffer = self._buffer.lstrip()[end:]
            self._state = self._leave_call
        else:
            self._give_up()

    def _tell_whole(self, call: Any) -> bool:
        if not isinstance(call, dict) or call.get("name") not in [*self.names]:
            return False
        given = call.get("arguments", call.get("parameters"))
        if not isinstance(given, str):
            given = json.dumps({} if given is None else given, ensure_ascii=False)
        self._begin(call["name"])
        self._tell(given)
        return True

    def _read_arguments(self) -> None:
        """The arguments as they come, to the end of their object."""
        for place, letter in enumerate(self._buffer):
            if self._escaped:
                self._escaped = False
            elif letter == "\\":
                self._escaped = self._in_text
            elif letter == '"':
                self._in_text = not self._in_text
            elif letter in "{}" and not self._in_text:
                self._depth += 1 if letter == "{" else -1
                if self._depth == 0:
                    self._tell(self._cut(place + 1))
                    self._state = self._leave_call
                    return
        self._tell(self._cut_all())

    def _leave_call(self) -> None:
        """What stands between the arguments and whatever comes next."""
        end = self.form.end
        if not end:
            self._buffer = self._buffer.lstrip(" \t\r\n;,]}")
            if self._buffer:
                self._state = self._read_head if self._buffer[0] == "{" else self._pass_on
            return
        rest = re.sub(r"^\s*\}?\s*", "", self._buffer)
        if rest.startswith(end):
            self._buffer = rest[len(end) :]
            self._state = self._skip_space
        elif self._over or not end.startswith(rest):
            self._buffer = rest
            self._state = self._skip_space


def _text_of(quoted: str) -> str | None:
    try:
        return str(json.loads(quoted, strict=False))
    except ValueError:
        return None


def _is_no_call(head: str, names: Collection[str]) -> bool:
    """Whether an object that begins like this cannot be a call."""
    if head.lstrip()[:1] not in ("{", ""):
        return True
    key = re.match(r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"((?:[^"\\]|\\.)*)"', head)
    if key is None:
        return len(head) >= _LONGEST_HEAD or bool(re.match(r'\s*\{\s*[^"\s]', head))
    if key[1] not in ("name", "arguments", "parameters", "type"):
        return True
    name = re.match(r'\s*:\s*("(?:[^"\\]|\\.)*")', head[key.end() :])
    return key[1] == "name" and name is not None and _text_of(name[1]) not in names
