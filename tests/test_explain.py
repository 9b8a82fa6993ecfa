"""scripts/explain.py: every module can be explained, from its source as it is, by name, path or words."""

import ast

import pytest

from nanochat import attention, gpt
from nanochat.errors import UserError
from scripts import explain

PROJECT = explain.read()
KNOWN = PROJECT.modules


@pytest.mark.parametrize("name", KNOWN)
def test_every_module_explains_itself(name):
    source = explain.find(KNOWN[name].path, KNOWN)
    text = explain.explain(source, PROJECT)
    assert source.name == name and text.startswith(f"# {source.path}\n")
    assert source.caption and source.caption in text, "give the module a caption"
    for node in source.tree.body:  # each public definition is listed with its own arguments
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert f"`def {node.name}({ast.unparse(node.args)})" in text
    for other in PROJECT.imports[name]:
        assert f"▶ {other}\n" in text
    assert "\n## Tests\n\n- " in text, "no test reaches this module"


TOY = '''"""A toy: it turns."""

SPEED = 3  # turns a second


def turn(x):
    """x (B, T) -> (T, B)."""
    return x.T  # (T, B)
'''


def test_it_reads_the_file_and_not_a_memory_of_it(tmp_path):
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "tests").mkdir()
    file = tmp_path / "nanochat" / "toy.py"
    file.write_text(TOY)
    (tmp_path / "tests" / "test_toy.py").write_text(
        "from nanochat import toy\n\n\ndef test_it_turns():\n    toy.turn\n"
    )

    def told():
        project = explain.read(tmp_path)
        return explain.explain(project.modules["nanochat.toy"], project)

    text = told()
    for line in ("`SPEED = 3`: turns a second", "`def turn(x)` (line 6)", "shape: `return x.T   # (T, B)`"):
        assert line in text
    assert "tests/test_toy.py: test_it_turns" in text
    file.write_text(file.read_text().replace("SPEED = 3", "SPEED = 4").replace("turn(x)", "spin(x, by)"))
    assert "SPEED = 4" in told() and "def spin(x, by)" in told() and "def turn" not in told()


@pytest.mark.slow
def test_constants_and_shapes_are_those_of_the_code():
    text = explain.main(explain.Config("gpt"))["text"]
    assert f"`SOFTCAP = {gpt.SOFTCAP}`" in text and "(B, T, Hkv, D)" in text
    text = explain.main(explain.Config("nanochat/attention.py"))["text"]
    assert all(name in text for name in attention.BACKENDS)


def test_the_drawing_names_both_sides():
    drawn = explain.diagram("b", ["x", "y", "z"], ["a"])
    assert drawn.splitlines() == ["              ┌▶ x", "a ──" + "─▶ [ b ] ─" + "┼▶ y", "              └▶ z"]
    assert explain.diagram("b", [], []) == "(no module) ───▶ [ b ] ──▶ (none of ours)"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("gpt", "nanochat.gpt"),
        ("scripts/base_train.py", "scripts.base_train"),
        ("best-fit packing", "nanochat.packing"),
        ("byte-level BPE merges", "nanochat.tokenizer"),
        ("tinyworld", "nanochat.tinyworld"),
        ("report", "nanochat.report"),
        ("./nanochat/serve/api.py", "nanochat.serve.api"),
        ("muon adamw", "nanochat.rules"),
    ],
)
def test_a_module_is_found_by_name_path_or_words(words, name):
    assert explain.find(words, KNOWN).name == name


def test_what_is_not_there_is_a_sentence():
    with pytest.raises(UserError, match="lists them all"):
        explain.find("zxqv", KNOWN)


@pytest.mark.slow
def test_without_a_name_every_module_is_listed(capsys):
    explain.main(explain.Config())
    shown = capsys.readouterr().out
    assert all(source.path in shown and source.caption in shown for source in KNOWN.values())
