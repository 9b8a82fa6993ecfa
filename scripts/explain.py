"""Explain a module from its source as it is: who imports whom, signatures, shapes, constants, the tests that cover it.

    python -m scripts.explain gpt
    python -m scripts.explain scripts/base_train.py
    python -m scripts.explain "sliding window"        # words: the module whose documentation speaks of them most
    python -m scripts.explain                         # lists every module with its caption

Nothing is told from memory: every line is read from the files, so it can't go out of date.
"""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Annotated

import tyro

from nanochat import cli
from nanochat.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("nanochat", "scripts", "tasks")
LETTER = r"[A-Z][a-z]*\d*|\d+|-1"  # a size in a shape: B, Tq, Hkv, 1
SHAPE = re.compile(rf"\((?:{LETTER}|[A-Z]\w*[ */+-]\w+)(?:\|\w+)?(?:, (?:{LETTER}|[\w |/*+-]{{1,12}}))+\)")
WIDE = 100  # characters of a constant's value that are shown
MOST_TESTS = 12  # named of a test file


@dataclasses.dataclass(frozen=True)
class Config:
    # a name (gpt), a path (nanochat/gpt.py), a dotted name, or words to look for; empty: list all modules
    module: Annotated[str, tyro.conf.Positional] = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """A module's text and tree. `name` is dotted: nanochat.gpt; `path` is relative to the project's root."""

    name: str
    path: str
    text: str
    tree: ast.Module

    @property
    def caption(self) -> str:
        return (ast.get_docstring(self.tree) or "").split("\n")[0].rstrip(".")


@dataclasses.dataclass(frozen=True)
class Project:
    """What there is to explain: modules by dotted name, the tests by path, and what each of both imports of ours."""

    modules: dict[str, Source]
    tests: dict[str, Source]
    imports: dict[str, list[str]]  # of a module by its name, of a test by its path


def read(root: Path = ROOT) -> Project:
    """The project's sources as they are now; empty package files are left out."""
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    known = {source.name: source for path in files if (source := parse(path, root)).tree.body}
    tests = {test.path: test for path in sorted((root / "tests").glob("test_*.py")) for test in [parse(path, root)]}
    return Project(known, tests, {name: imports(source, known) for name, source in (known | tests).items()})


def parse(path: Path, root: Path) -> Source:
    """One file."""
    text = path.read_text(encoding="utf-8")
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Source(name, path.relative_to(root).as_posix(), text, ast.parse(text))


# -- which module is meant -------------------------------------------------------------------------------------------


def find(asked: str, known: dict[str, Source]) -> Source:
    """The module of this name or path, else the one whose documentation speaks most of these words. UserError: none."""
    dotted = asked.strip().removeprefix("./").removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    exact = [name for name in known if name == dotted] or [name for name in known if name.endswith(f".{dotted}")]
    if exact:  # the library's first: scripts and tasks of the same name use it
        return known[min(exact, key=lambda name: (not name.startswith("nanochat."), name.count("."), name))]
    words = re.findall(r"\w+", asked.lower())
    scores = {name: score(source, words) for name, source in known.items()}
    best = max(scores, key=lambda name: scores[name])
    if not words or not scores[best]:
        raise UserError(f"No module is called {asked!r} or speaks of it: `python -m scripts.explain` lists them all.")
    return known[best]


def score(source: Source, words: list[str]) -> float:
    """How much a module's names and docstrings speak of the words: all of them count first, then how often."""
    documented = [n for n in ast.walk(source.tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    texts = [source.name.replace(".", " ") + " " + (ast.get_docstring(source.tree) or "")] * 3
    texts += [f"{node.name.replace('_', ' ')} {ast.get_docstring(node) or ''}" for node in documented]
    text = " ".join(texts).lower()
    counts = [len(re.findall(rf"\b{re.escape(word.rstrip('s'))}", text)) for word in words]
    return sum(count > 0 for count in counts) * 1000 + sum(min(count, 50) for count in counts)


# -- what its source says --------------------------------------------------------------------------------------------


def imports(source: Source, known: dict[str, Source]) -> list[str]:
    """The project's modules that this one imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return sorted(name for name in found if name in known and name not in ("nanochat", source.name))


def joint(i: int, count: int, middle: int, ends: str) -> str:
    """The piece of line at entry i of `count`; `ends` has those of the first, the last, the middle and the others."""
    top, bottom, through, side = ends
    if count == 1:
        return "─"
    if i == middle:
        return through if 0 < i < count - 1 else "┬" if i == 0 else "┴"
    return top if i == 0 else bottom if i == count - 1 else side


def diagram(name: str, below: list[str], above: list[str]) -> str:
    """Who imports it, it, and what it imports, as a drawing in characters."""
    left, right = above or ["(no module)"], below or ["(none of ours)"]
    wide, box = max(map(len, left)), f"─▶ [ {name} ] ─"
    middle = max((len(left) - 1) // 2, (len(right) - 1) // 2)
    lines = []
    for row in range(middle + 1 + max(len(left) // 2, len(right) // 2)):
        i, j = row - middle + (len(left) - 1) // 2, row - middle + (len(right) - 1) // 2
        a, b = 0 <= i < len(left), 0 <= j < len(right)
        from_left = f"{left[i]:<{wide}} ─{joint(i, len(left), (len(left) - 1) // 2, '┐┘┼┤')}" if a else " " * (wide + 3)
        to_right = f"{joint(j, len(right), (len(right) - 1) // 2, '┌└┼├')}▶ {right[j]}" if b else ""
        lines.append((from_left + (box if row == middle else " " * len(box)) + to_right).rstrip())
    return "\n".join(lines)


def comment(line: str) -> str:
    """What stands behind the # of a source line."""
    return line.split("  # ", 1)[1].strip() if "  # " in line else ""


def constants(source: Source) -> list[tuple[str, str, str]]:
    """(name, value, comment) of the module's constants, as they are written."""
    lines, out = source.text.splitlines(), []
    for node in source.tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names = [name for target in targets for name in ast.unparse(target).strip("()").split(", ")]
        if targets and node.value is not None and all(re.fullmatch(r"[A-Z][A-Z0-9_]*", name) for name in names):
            value = " ".join(ast.unparse(node.value).split())
            short = value if len(value) <= WIDE else value[: WIDE - 3] + "..."
            out.append((", ".join(names), short, comment(lines[node.lineno - 1])))
    return out


def signature(node: ast.FunctionDef) -> str:
    """`name(arguments) -> result`, as it is written."""
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){result}"


def shapes(node: ast.AST, text: str) -> list[str]:
    """Comments within a definition that state a tensor's shape, each with the line they explain."""
    out = []
    for line in text.splitlines()[node.lineno - 1 : node.end_lineno]:
        note = comment(line)
        if SHAPE.search(note):
            out.append(f"{line.split('  # ', 1)[0].strip()}   # {note}")
    return out


def first_sentence(node: ast.AST) -> str:
    return (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")


def members(node: ast.ClassDef) -> list[str]:
    """A class's fields (with their comments) and public methods, a line each."""
    return [
        f"{signature(item)}: {first_sentence(item)}".rstrip(": ")
        for item in node.body
        if isinstance(item, ast.FunctionDef) and (not item.name.startswith("_") or item.name == "__init__")
    ]


def fields(node: ast.ClassDef, text: str) -> list[str]:
    """A class's annotated fields as they are written, comments included."""
    lines = text.splitlines()
    return [lines[item.lineno - 1].strip() for item in node.body if isinstance(item, ast.AnnAssign)]


def tests_of(source: Source, project: Project) -> list[tuple[str, list[str]]]:
    """(test file, tests) of the files that import the module: all of the one named after it, else those that use it."""
    stem = source.name.split(".")[-1]
    out = []
    for path, test in project.tests.items():
        if source.name not in project.imports[path]:
            continue
        own = [n for n in test.tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
        if path != f"tests/test_{stem}.py":
            lines = test.text.splitlines()
            own = [n for n in own if re.search(rf"\b{stem}\b", "\n".join(lines[n.lineno - 1 : n.end_lineno]))]
        out.append((path, [n.name for n in own]))
    return sorted(out, key=lambda pair: (pair[0] != f"tests/test_{stem}.py", pair[0]))


def covered(source: Source, project: Project) -> list[str]:
    """The tests that cover it, a line a file; where none imports it, the tested modules through which it is used."""
    out = []
    for path, names in tests_of(source, project):
        more = f" and {len(names) - MOST_TESTS} more" if len(names) > MOST_TESTS else ""
        out.append(f"- {path}: {', '.join(names[:MOST_TESTS]) or 'through its helpers'}{more}")
    return out or through(source, project) or by_word(source, project)


def through(source: Source, project: Project) -> list[str]:
    """The nearest modules above it that tests import, and the first of those tests."""
    seen, level = {source.name}, [source.name]
    while level:
        level = [n for n in project.modules if n not in seen and set(level) & set(project.imports[n])]
        seen |= set(level)
        users = [project.modules[name] for name in level]
        tested = [f"- through {user.path}: {found[0][0]}" for user in users if (found := tests_of(user, project))]
        if tested:
            return tested
    return []


def by_word(source: Source, project: Project) -> list[str]:
    """The tests that speak of it, for a module that is loaded by its name or run as a program of its own."""
    stem = source.name.split(".")[-1]
    return [f"- {path}, by name" for path, test in project.tests.items() if re.search(rf"\b{stem}\b", test.text)]


# -- on paper ----------------------------------------------------------------------------------------------------------


def definitions(source: Source) -> list[str]:
    """The listing of public classes and functions, in the order of the file, as Markdown."""
    out = []
    for node in source.tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "def"
        head = node.name if kind == "class" else signature(node)
        out.append(f"- `{kind} {head}` (line {node.lineno}): {first_sentence(node)}".rstrip(": "))
        if isinstance(node, ast.ClassDef):
            out += [f"    - `{line}`" for line in fields(node, source.text)]
            out += [f"    - {line}" for line in members(node)]
        out += [f"    - shape: `{line}`" for line in shapes(node, source.text)]
    return out


def explain(source: Source, project: Project) -> str:
    """The whole explanation of a module, as Markdown."""
    below = project.imports[source.name]
    above = [name for name in project.modules if source.name in project.imports[name]]
    out = [f"# {source.path}", "", ast.get_docstring(source.tree) or "(no docstring)", "", "## Who imports whom", ""]
    out += ["```", diagram(source.name, below, above), "```"]
    if rows := constants(source):
        out += ["", "## Constants", ""] + [f"- `{n} = {value}`{f': {why}' if why else ''}" for n, value, why in rows]
    if rows := definitions(source):
        out += ["", "## Listing", "", *rows]
    out += ["", "## Tests", "", *(covered(source, project) or ["No test reaches it."])]
    after = ", ".join(project.modules[name].path for name in below[:4]) or "nothing below it"
    return "\n".join([*out, "", f"{len(source.text.splitlines())} lines; read on with: {after}"])


def main(cfg: Config) -> dict:
    """Print the explanation (or the list of modules); returns {"module", "text"}."""
    project = read()
    if not cfg.module.strip():
        text = "\n".join(f"{source.path:<32} {source.caption}" for source in project.modules.values())
        print(text)
        return {"module": "", "text": text}
    source = find(cfg.module, project.modules)
    text = explain(source, project)
    print(text)
    return {"module": source.name, "text": text}


if __name__ == "__main__":
    cli.run(main, Config)
