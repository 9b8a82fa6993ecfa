"""Render the four animations of a run with Remotion (visualize/): stills or videos, from the props of visualize_data.

    python -m scripts.visualize                               # is everything there? says what is missing
    python -m scripts.visualize --install                     # npm install in visualize/, at the pinned versions
    python -m scripts.visualize_data --model-tag=pocket       # the props, from a checkpoint and its record
    python -m scripts.visualize --render=still                # the last frame of each as PNG
    python -m scripts.visualize --render=video --composition=TrainingLoss
    python -m scripts.visualize --render=video --scale=0.25 --frames=30   # a quick look

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
from typing import Any

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
SIZE = (1920, 1080)  # visualize/src/theme.ts
OLDEST_NODE = 18
PATIENCE = 300.0  # seconds for a program to say its version
FETCHING = re.compile(  # npm's codes of a registry that refuses or can't be reached
    r"\bcode (E[45]\d\d|ECONN\w+|E\w*TIMEDOUT|ERR_SOCKET\w+|E\w+UNREACH|ENOTFOUND|EAI_AGAIN|ENOTCACHED)\b"
)
INSTALLING = 900.0  # seconds for npm install
BUNDLING = 300.0  # seconds for the bundle and the browser's start


@dataclasses.dataclass(frozen=True)
class Config:
    install: bool = False  # run npm install in visualize/ first
    render: str = ""  # still (PNG) or video (MP4); empty: only say whether everything is there
    composition: str = ""  # one of the four; empty: all
    frame: int = -1  # of a still, from 0; -1: the last
    frames: int = 0  # of a video: only so many, from the first; 0: all
    scale: float = 1.0  # of 1,920 x 1,080 pixels
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


class CantFetch(UserError):
    """npm can't bring the packages: no way to the registry, or it refuses."""


def npm(words: list[str], timeout: float) -> None:
    """Run npm in the project. CantFetch: the registry can't be reached, or refuses. UserError: another failure."""
    shown = f"`{' '.join(words[:2])}` in {PROJECT}"
    try:
        done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise CantFetch(f"{shown} has not ended in {timeout:.0f} s: is the registry reachable?") from error
    if done.returncode:
        said = "; ".join(done.stderr.strip().splitlines()[:3]) or "no message"
        if FETCHING.search(done.stderr):
            raise CantFetch(f"{shown} failed ({said}): is the registry reachable?")
        raise UserError(f"{shown} failed: {said}")


def install() -> None:
    """npm install at the pinned versions; the lock file stays here, since it names the registry it was made with.

    CantFetch: the registry can't be reached, or refuses. UserError: npm is missing or fails for another reason.
    """
    if not ask("npm", "--version"):
        raise UserError("npm is not here: install node from nodejs.org or your system, it comes with it.")
    quiet = ["--prefer-offline", "--loglevel=error"]
    soon = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=60000"]
    npm(
        ["npm", "view", f"remotion@{wanted()['remotion']}", "version", *quiet, *soon], PATIENCE
    )  # or it tries for 9 min
    npm(["npm", "install", "--no-audit", "--no-fund", *quiet], INSTALLING)


def job(cfg: Config, names: list[str], props: Path, output: Path, folder: Path, browser: str) -> dict[str, Any]:
    """What visualize/render.mjs is to render: pictures from files in `props` into `output`, by way of `folder`."""
    suffix = "png" if cfg.render == "still" else "mp4"
    pictures = [
        {"name": name, "props": str(props / f"{name}.json"), "target": str(output / f"{name}.{suffix}")}
        for name in names
    ]
    return {"folder": str(folder), "kind": cfg.render, "browser": browser, "patience": round(1000 * cfg.timeout),
            "frame": cfg.frame, "frames": cfg.frames, "scale": cfg.scale, "pictures": pictures}  # fmt: skip


def run(words: list[str], timeout: float) -> None:
    """Run node in the project, showing what it prints. UserError: it failed or took too long; nothing of it goes on."""
    process = subprocess.Popen(words, cwd=PROJECT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=timeout)
    except BaseException as error:  # Ctrl-C too: node has started the browser
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            text = f"`{' '.join(words[:5])}` took more than {timeout:.0f} s: raise --timeout."
            raise UserError(text) from error
        raise
    if process.returncode:
        raise UserError(f"`{' '.join(words[:5])}` failed: {said.strip()[-600:]}")


def render(cfg: Config, browser: str) -> list[str]:
    """Render each composition, in one process of node with one bundle and one browser; returns the files."""
    props = Path(cfg.props).resolve() if cfg.props else paths.base_dir() / "visualize"
    names = [cfg.composition] if cfg.composition else list(COMPOSITIONS)
    absent = [name for name in names if not (props / f"{name}.json").exists()]
    if absent:
        raise UserError(f"{props} lacks {absent[0]}.json: write it with `python -m scripts.visualize_data`.")
    output = Path(cfg.output).resolve() if cfg.output else props
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rendering-", dir=output) as folder:
        work = job(cfg, names, props, output, Path(folder), browser)
        paths.write_json(Path(folder) / "job.json", work)
        run(["node", "render.mjs", f"{folder}/job.json"], BUNDLING + len(names) * cfg.timeout)
    return [picture["target"] for picture in work["pictures"]]


def main(cfg: Config) -> dict:
    """Install, check, render; returns {"problems", "files"}."""
    if cfg.render not in ("", "still", "video"):
        raise UserError(f"--render={cfg.render} is unknown: use still or video.")
    if cfg.composition and cfg.composition not in COMPOSITIONS:
        raise UserError(f"--composition={cfg.composition} is unknown: use one of {', '.join(COMPOSITIONS)}.")
    if cfg.frames < 0 or not 0 < cfg.scale <= 4:
        raise UserError("--frames is 0 (all) or more, --scale above 0 and up to 4.")
    if cfg.render == "video" and any(round(side * cfg.scale, 6) % 2 for side in SIZE):
        wide, high = (f"{side * cfg.scale:g}" for side in SIZE)
        raise UserError(f"--scale={cfg.scale:g} makes {wide} x {high} pixels, a video needs even numbers: try 0.5.")
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
