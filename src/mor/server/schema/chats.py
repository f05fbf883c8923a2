"""A chat as the chat template turns it into one text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mor.server.schema.basics import WRONG, EmptyIsNull, Refusal, Strict
from mor.server.schema.messages import Message
from mor.server.schema.tools import Tool, ToolChoice


class Turns(Strict):
    """What the chat template is given."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | ToolChoice | None, EmptyIsNull()
    ] = Field(None, description="default auto")
    add_generation_prompt: bool | None = Field(
        None, description="default true, but with continue_final_message"
    )
    continue_final_message: bool | None = Field(None, description="go on in the last message")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=128, description="further variables of the chat template"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Turns:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt=false")
        names = [tool.function.name for tool in self.tools or ()]
        for name in names:
            if names.count(name) > 1:
                raise Refusal(WRONG, "tools", f"two functions are called {name!r}; rename one")
        choice = self.tool_choice
        if isinstance(choice, ToolChoice) and choice.function.name not in names:
            wanted = choice.function.name
            raise Refusal(WRONG, "tool_choice", f"no function of tools is called {wanted!r}")
        if choice == "required" and not names:
            raise Refusal(WRONG, "tool_choice", "'required' needs tools")
        return self

    @property
    def usable_tools(self) -> list[Tool]:
        """Functions that may be called in the answer."""
        return [] if self.tool_choice == "none" else self.tools or []
