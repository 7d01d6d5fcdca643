"""Every flag of every command has a help that is a sentence and names its default."""

import argparse
import ast
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def commands():
    """The modules of the tree that can be run and that read flags."""
    for room in ("training", "bench", "sosd_fast"):
        for path in sorted((ROOT / room).rglob("*.py")):
            tree = ast.parse(path.read_text())
            if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
                yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


class Found(Exception):
    """Carries the parser that a command has built."""


def parser_of(module: str, monkeypatch) -> argparse.ArgumentParser:
    """The parser of a command, caught at the moment it would read its flags."""

    def catch(self, *_args, **_kwargs):
        raise Found(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", catch)  # parse_args calls it
    monkeypatch.setattr(sys, "argv", [module])
    with pytest.raises(Found) as found:
        importlib.import_module(module).main()
    return found.value.args[0]


def faults(parser: argparse.ArgumentParser) -> list[str]:
    """The flags of a parser and of its commands whose help is no sentence, or is silent about the default."""
    wrong = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            wrong += [f"{a.dest}: {a.help!r}" for a in action._choices_actions if not _is_sentence(a.help)]
            wrong += [fault for each in action.choices.values() for fault in faults(each)]
        elif not isinstance(action, argparse._HelpAction | argparse._VersionAction):
            text = parser._get_formatter()._expand_help(action) if action.help else None
            name = (action.option_strings or [action.dest])[0]
            if not _is_sentence(text):
                wrong.append(f"{name}: {text!r} is no sentence")
            elif not action.required and "default" not in text:
                wrong.append(f"{name}: {text!r} says no default")
            elif action.default not in (None, False, argparse.SUPPRESS):
                values = action.default if isinstance(action.default, list | tuple) else [action.default]
                wrong += [f"{name}: {text!r} does not name {v}" for v in values if str(v) not in text]
    return wrong


def _is_sentence(text):
    return bool(text) and text[0].isupper() and text.endswith(".") and "\n" not in text


COMMANDS = list(commands())


@pytest.mark.parametrize("module", COMMANDS)
def test_every_flag_has_a_sentence_with_its_default(module, monkeypatch):
    if module in ("bench.compile_report", "bench.rehearse") and not importlib.util.find_spec("triton"):
        pytest.skip("Triton is not installed")
    assert not faults(parser_of(module, monkeypatch))


def test_all_commands_are_looked_at():
    assert {"training.run", "training.prepare", "training.paper.reproduce", "bench.gpu", "sosd_fast.__main__"} <= {
        *COMMANDS
    }


@pytest.mark.parametrize("text", ["of the step", "Steps of training", "Steps, by default a few.", "Steps.", None])
def test_a_bad_help_is_found(text):
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    commands.add_parser("run", help="Runs.").add_argument("--steps", default=3, help=text)
    assert len(faults(parser)) == 1
