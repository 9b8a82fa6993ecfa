"""Write the README's tree anew from the first line of each module's docstring.

python -m scripts.tree
"""

import ast
import dataclasses
import re
from pathlib import Path

from nanochat import cli, paths

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "nanochat",
    "nanochat/kernels",
    "nanochat/tinyworld",
    "nanochat/serve",
    "nanochat/export",
    "scripts",
    "tasks",
)
PLACE = re.compile(r"(<!-- made from [^>]*-->\n```\n)(.*?)(```)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Config:
    readme: str = str(ROOT / "README.md")  # file whose tree is replaced


def caption(path: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].rstrip(".:")


def tree() -> str:
    """Folders and modules with their captions, and the recipes with the second line of theirs."""
    lines = []
    for folder in FOLDERS:
        files = [p for p in sorted((ROOT / folder).glob("*.py")) if p.name != "__init__.py"]
        if files:
            lines.append(f"{folder}/")
            lines += [f"  {path.name:<20} {caption(path)}" for path in files]
    lines.append("runs/")
    for path in sorted((ROOT / "runs").glob("*.sh")):
        comment = next(line for line in path.read_text().splitlines() if line.startswith("# "))
        lines.append(f"  {path.name:<20} {comment[2:].rstrip('.:')}")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> dict:
    """Replace the tree in the README; returns whether it changed."""
    readme = Path(cfg.readme)
    old = readme.read_text(encoding="utf-8")
    new = PLACE.sub(lambda match: match[1] + tree() + match[3], old)
    if new != old:
        with paths.atomic_write(readme, "w") as file:
            file.write(new)
    print("README.md: the tree has changed" if new != old else "README.md: the tree is up to date")
    return {"changed": new != old}


if __name__ == "__main__":
    cli.run(main, Config)
