"""The sections of dcgan.py: a map of them in the docstring, and no two that need each other."""

import ast
import graphlib
import re

import pytest
from conftest import SCRIPT

SOURCE = SCRIPT.read_text(encoding="utf-8")
BANNER = re.compile(r"^# -{20,} (.+)$", re.MULTILINE)


def titles(text):
    return [match[1] for match in BANNER.finditer(text)]


def sections(text):
    """{title of a section: its top-level statements}."""
    lines = [text[: match.start()].count("\n") + 1 for match in BANNER.finditer(text)]
    found = {title: [] for title in titles(text)}
    for node in ast.parse(text).body:
        above = sum(line < node.lineno for line in lines)
        if above:
            found[titles(text)[above - 1]].append(node)
    return found


def defined(node):
    """The names that a top-level statement defines."""
    if hasattr(node, "name"):
        return [node.name]
    targets = getattr(node, "targets", [])
    return [name.id for target in targets for name in ast.walk(target) if hasattr(name, "id")]


def needs(text):
    """{title of a section: the titles of the other sections whose names it uses}."""
    found = sections(text)
    home = {name: title for title in found for node in found[title] for name in defined(node)}
    used = {
        title: {name.id for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)}
        for title, nodes in found.items()
    }
    return {title: {home[name] for name in used[title] & home.keys()} - {title} for title in found}


def test_no_two_sections_need_each_other():
    order = list(graphlib.TopologicalSorter(needs(SOURCE)).static_order())
    assert order[0] == "settings" and order[-1] == "command line"


def test_a_circle_of_sections_would_be_found():
    circle = SOURCE.replace("def readable(size):\n", "def readable(size):\n    pick_device()\n")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(needs(circle)).prepare()


def test_the_map_in_the_docstring_names_all_sections_in_order():
    about = ast.get_docstring(ast.parse(SOURCE))
    chart = about.partition("in order")[2].partition("\n\nMeasured")[0]
    rows = re.findall(r"^    (\S.*?)  +", chart, re.MULTILINE)
    assert rows == [title.partition(":")[0] for title in titles(SOURCE)]
