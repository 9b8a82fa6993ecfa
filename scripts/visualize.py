"""Render the four animations of a run with Remotion (visualize/): stills or videos, from the props of visualize_data.

    python -m scripts.visualize                               # is everything there? says what is missing
    python -m scripts.visualize --install                     # npm install in visualize/, at the pinned versions
    python -m scripts.visualize_data --model-tag=pocket       # the props, from a checkpoint and its record
    python -m scripts.visualize --render=still                # the last frame of each as PNG
    python -m scripts.visualize --render=video --composition=TrainingLoss

Needs node 18 or newer with npm, and Chrome or Chromium (Debian: `apt install chromium`); FFmpeg comes with Remotion.
Remotion is free for individuals, non-profit organisations and companies of up to three people; others need a licence
(remotion.dev/license). Without node: `python -m scripts.visualize_data --png` draws the same four with matplotlib.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from nanochat import cli, paths
from nanochat.errors import UserError

PROJECT = Path(__file__).resolve().parents[1] / "visualize"
COMPOSITIONS = ("TransformerArchitecture", "TrainingLoss", "AttentionVisualization", "ScalingLaws")
BROWSERS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)
OLDEST_NODE = 18
PATIENCE = 60.0  # seconds for a program to say its version


@dataclasses.dataclass(frozen=True)
class Config:
    install: bool = False  # run npm install in visualize/ first
    render: str = ""  # still (PNG) or video (MP4); empty: only say whether everything is there
    composition: str = ""  # one of the four; empty: all
    frame: int = -1  # of a still, from 0; -1: the last
    props: str = ""  # folder of the props files; empty: visualize/ in the artefact folder
    output: str = ""  # folder for what is rendered; empty: the folder of the props
    browser: str = ""  # program to draw with; empty: the first Chrome or Chromium found
    timeout: float = 600.0  # seconds for each picture or video


def ask(*command: str) -> str:
    """What a program says of itself, first line; empty if it is missing or fails. UserError: it does not answer."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        text = f"`{' '.join(command)}` has not answered for {PATIENCE:g} s: run this again on a quieter machine."
        raise UserError(text) from error
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def wanted() -> dict[str, str]:
    """The pinned packages. UserError: the project's folder is not here (the wheel leaves it out)."""
    file = PROJECT / "package.json"
    if not file.exists():
        raise UserError(f"The video project {PROJECT} is not here: run this in a clone of the repository.")
    package = paths.read_json(file)
    return package["dependencies"] | package["devDependencies"]


def installed() -> dict[str, str]:
    """The versions that lie in node_modules, of the packages that are wanted."""
    found = {}
    for name in wanted():
        file = PROJECT / "node_modules" / name / "package.json"
        if file.exists():
            found[name] = json.loads(file.read_text(encoding="utf-8"))["version"]
    return found


def find_browser(asked: str) -> str:
    """Path of the browser to draw with; empty: none found. UserError: the one asked for is not there."""
    if asked and shutil.which(asked) is None:
        raise UserError(f"--browser={asked} is not a program: give the path of Chrome or Chromium.")
    return shutil.which(asked) if asked else next((path for name in BROWSERS if (path := shutil.which(name))), "")


def missing(browser: str) -> list[str]:
    """A sentence for each thing without which nothing can be rendered, with its remedy."""
    node = re.match(r"v(\d+)", ask("node", "--version"))
    problems = []
    if node is None or int(node[1]) < OLDEST_NODE or not ask("npm", "--version"):
        problems.append(f"node {OLDEST_NODE} or newer with npm is needed: install it from nodejs.org or your system.")
    have = installed()
    wrong = [f"{name} {version}" for name, version in wanted().items() if have.get(name) != version]
    if wrong:
        problems.append(f"visualize/ lacks {', '.join(wrong)}: run `python -m scripts.visualize --install`.")
    if not browser:
        problems.append(
            "no Chrome or Chromium was found: install one (Debian: `apt install chromium`), or --browser=PATH."
        )
    return problems


def install() -> None:
    """npm install at the pinned versions; the lock file stays here, since it names the registry it was made with."""
    if not ask("npm", "--version"):
        raise UserError("npm is not here: install node from nodejs.org or your system, it comes with it.")
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"], cwd=PROJECT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(
            f"npm install failed in {PROJECT} ({said[0] if said else 'no message'}): is the registry reachable?"
        )


def command(cfg: Config, name: str, bundle: Path, props: Path, target: Path, browser: str) -> list[str]:
    """The Remotion command that renders a composition."""
    kind = ["still"] if cfg.render == "still" else ["render"]
    frame = [f"--frame={cfg.frame}"] if cfg.render == "still" else []
    patience = f"--timeout={1000 * cfg.timeout:.0f}"  # or the browser has 30 s to start, too few on a busy machine
    return ["npx", "--no-install", "remotion", *kind, str(bundle), name, str(target), f"--props={props}",
            f"--browser-executable={browser}", "--log=error", patience, *frame]  # fmt: skip


def run(words: list[str], timeout: float) -> None:
    """Run a Remotion command in the project. UserError: it failed or took too long, then nothing of it goes on."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, cwd=PROJECT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:  # Ctrl-C too: npx has started node, and node the browser
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            text = f"`{' '.join(words[:5])}` took more than {timeout:.0f} s: raise --timeout."
            raise UserError(text) from error
        raise
    if process.returncode:
        raise UserError(f"`{' '.join(words[:5])}` failed: {(err or out).strip()[-600:]}")


def render(cfg: Config, browser: str) -> list[str]:
    """Bundle once, then render each composition; returns the files."""
    props = Path(cfg.props).resolve() if cfg.props else paths.base_dir() / "visualize"
    names = [cfg.composition] if cfg.composition else list(COMPOSITIONS)
    absent = [name for name in names if not (props / f"{name}.json").exists()]
    if absent:
        raise UserError(f"{props} lacks {absent[0]}.json: write it with `python -m scripts.visualize_data`.")
    output = Path(cfg.output).resolve() if cfg.output else props
    output.mkdir(parents=True, exist_ok=True)
    files = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        run(["npx", "--no-install", "remotion", "bundle", "src/index.ts", f"--out-dir={bundle}", "--log=error"], 300)
        for name in names:
            target = output / f"{name}.{'png' if cfg.render == 'still' else 'mp4'}"
            run(command(cfg, name, bundle, props / f"{name}.json", target, browser), cfg.timeout)
            print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")
            files.append(str(target))
    return files


def main(cfg: Config) -> dict:
    """Install, check, render; returns {"problems", "files"}."""
    if cfg.render not in ("", "still", "video"):
        raise UserError(f"--render={cfg.render} is unknown: use still or video.")
    if cfg.composition and cfg.composition not in COMPOSITIONS:
        raise UserError(f"--composition={cfg.composition} is unknown: use one of {', '.join(COMPOSITIONS)}.")
    if cfg.install:
        install()
    browser = find_browser(cfg.browser)
    problems = missing(browser)
    for name, said in (("node", ask("node", "--version")), ("npm", ask("npm", "--version")), ("browser", browser),
                       ("remotion", installed().get("remotion", ""))):  # fmt: skip
        print(f"{name:<10}{said or 'missing'}")
    if cfg.render and problems:
        raise UserError("\n  ".join(["Nothing can be rendered yet:", *problems]))
    for problem in problems:
        print(f"missing: {problem}")
    return {"problems": problems, "files": render(cfg, browser) if cfg.render else []}


if __name__ == "__main__":
    cli.run(main, Config)
