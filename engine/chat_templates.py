"""Which chat template a run uses.

    template: a file                        that file
    alpaca, chatml, default, vicuna         a format of its own: engine/templates/<name>.jinja
    the name of a model family              the tokenizer's own template; if it has none, the family's from there
    another name, or unset                  the tokenizer's own template

LLaMA-Factory's names are known. The template is saved with the result, so what is served is what was trained. The
files mark answers with {% generation %}: the text up to the end token, and nothing that a format writes after it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fuselora.engine.errors import expected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).parent / "templates"
FORMATS = ("alpaca", "chatml", "default", "vicuna")
# How names of model families begin, and the file with their format; the first that fits counts.
FAMILIES = {
    "llama3": "llama3",
    "llama4": "llama3",
    "qwen": "qwen",
    "gemma": "gemma",
    "mistral": "mistral",
    "ministral": "mistral",
    "phi4": "phi4",
    "phi": "phi",
    "yi": "chatml",
    "intern2": "chatml",
    "smollm": "chatml",
}


def template_file(template: str) -> Path | None:
    """The file that ``template`` names; None if it is a name of another kind."""
    path = Path(template).expanduser()
    if path.is_file():
        return path
    if path.suffix == ".jinja" or len(path.parts) > 1:
        want = "a file with a Jinja chat template, or a name"
        raise expected("template", want, f"{template!r}, which is not a file", "check the path")
    return None


def set_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """Give ``tokenizer`` the template that ``template`` asks for. Returns one line that says which it has now."""
    if template is None:
        return "chat template: the tokenizer's own" if tokenizer.chat_template else "chat template: none"
    if (path := template_file(template)) is not None:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        return f"chat template: {path}"
    if template in FORMATS:
        tokenizer.chat_template = shipped(template)
        return f"chat template: the format {template}"
    family = next((file for name, file in FAMILIES.items() if template.startswith(name)), None)
    if tokenizer.chat_template:
        return f"chat template: the tokenizer's own, not one called {template}"
    if family is None:
        remedy = f"name one of {', '.join((*FORMATS, *FAMILIES))}, or a file with a Jinja template"
        raise expected("template", "a known name, as the tokenizer has no chat template", repr(template), remedy)
    tokenizer.chat_template = shipped(family)
    return f"chat template: {family}, as the tokenizer has none"


def shipped(name: str) -> str:
    """A template of engine/templates."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
