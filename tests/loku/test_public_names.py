"""No public name and no option of a command is lost.

``tests/data/public_names.json`` lists those of version 0.1.0. Options of fields of
transformers are left out.
"""

import argparse
import importlib
import json
from pathlib import Path

import pytest

from loku.commands import demo, evaluate, info, unlearn

PUBLIC = json.loads((Path(__file__).parents[1] / "data" / "public_names.json").read_text(encoding="utf-8"))
COMMANDS = {"demo": demo, "evaluate": evaluate, "info": info, "unlearn": unlearn}


@pytest.mark.parametrize("module", PUBLIC["names"])
def test_names(module):
    known = importlib.import_module(module)
    assert [name for name in PUBLIC["names"][module] if not hasattr(known, name)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_options(command):
    parser = COMMANDS[command].add(argparse.ArgumentParser().add_subparsers())
    if getattr(parser, "add_later", None) is not None:
        parser.add_later()
    options = {option for action in parser._actions for option in action.option_strings}
    assert set(PUBLIC["options"][command]) <= options
