"""Write what the four pictures of a run show, from its checkpoint and record: one JSON file of props each.

    python -m scripts.visualize_data --model-tag=pocket                  # into <artefacts>/visualize/
    python -m scripts.visualize_data --model-tag=pocket --png            # and the four pictures as PNG (matplotlib)
    python -m scripts.visualize_data --prompt="The cat sat on the"

TransformerArchitecture.json and AttentionVisualization.json come from the checkpoint (attention is computed by the
model, on the prompt), TrainingLoss.json from the records of its stages, ScalingLaws.json from all base runs of the
artefact folder. The Remotion project in visualize/ animates the same files; no number stands anywhere else.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from nanochat import attention, checkpoint, cli, cost, paths, pictures, plots, record, report, scaling
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer

POINTS = 300  # of a curve, at most: a picture is not wider
SHOWN_LAYERS, SHOWN_HEADS, SHOWN_TOKENS = 3, 4, 24  # of attention maps: what can be read at 1,920 pixels
PROMPT = "What is the opposite of hot? The opposite of hot is cold."
DEPTHS = (4, 6, 8, 10, 12, 16, 20, 24, 32)  # of the plan's curve


@dataclasses.dataclass(frozen=True)
class Config:
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "base"  # base, sft or rl: whose weights are shown
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""  # which run; empty: the largest depth, else newest
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1  # of the checkpoint; -1: the newest
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = PROMPT  # the text whose attention is shown
    prefix: str = ""  # base runs whose tag begins so make up the scaling picture; empty: all finished ones
    output: str = ""  # folder; empty: visualize/ in the artefact folder
    png: bool = False  # draw the four as PNG too


# -- the model ---------------------------------------------------------------------------------------------------------


def architecture(model: GPT, tag: str) -> dict[str, Any]:
    """Shape, windows, parameters by role, costs and the learnt residual scalars of a model."""
    config = model.config
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {
        "tag": tag,
        "config": dataclasses.asdict(config) | {"head_dim": config.head_dim},
        "layers": [
            {"window": window, "value_embedding": config.has_value_embedding(i),
             "resid": round(float(own["resid_lambdas"][i]), 4), "x0": round(float(own["x0_lambdas"][i]), 4)}
            for i, window in enumerate(config.windows())
        ],
        "smear": round(float(own["smear_lambda"]), 4),
        "backout": round(float(own["backout_lambda"]), 4),
        "parameters": cost.parameters(config),
        "flops_per_token": cost.flops_per_token(config),
        "kv_bytes_per_token": cost.kv_bytes_per_token(config),
    }  # fmt: skip


def attention_maps(model: GPT, ids: list[int]) -> list[torch.Tensor]:
    """What every layer's heads read on this text: (H, T, T) a layer, rows sum to 1; the forward itself is unchanged."""
    seen: list[torch.Tensor] = []
    before = model.attend

    def watched(q, k, v, window):
        seen.append(attention.weights(q, k, window)[0])
        return before(q, k, v, window)

    model.attend = watched
    try:
        with torch.no_grad():
            model(torch.tensor([ids], device=model.lm_head.weight.device))
    finally:
        model.attend = before
    return seen


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, first and last included, evenly."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def attention_props(model: GPT, tokenizer: Tokenizer, prompt: str, tag: str) -> dict[str, Any]:
    """The attention maps of a few layers and heads over the tokens of a text. UserError: the text has no token."""
    ids = tokenizer.encode(prompt, prepend=tokenizer.bos)[:SHOWN_TOKENS]
    if len(ids) < 2:
        raise UserError("--prompt is empty: give a few words, whose attention is to be shown.")
    maps, windows = attention_maps(model, ids), model.windows()
    layers = [
        {"layer": i, "window": windows[i], "heads": [
            {"head": h, "weights": [[round(p, 4) for p in row] for row in maps[i][h].tolist()]}
            for h in spread(model.config.n_head, SHOWN_HEADS)
        ]}
        for i in spread(model.config.n_layer, SHOWN_LAYERS)
    ]  # fmt: skip
    return {"tag": tag, "tokens": ["bos", *(tokenizer.decode([token]) for token in ids[1:])], "layers": layers}


# -- the record --------------------------------------------------------------------------------------------------------


def thin(x: list, y: list) -> dict[str, list]:
    """A curve with at most POINTS points, evenly taken, first and last included."""
    keep = spread(len(x), POINTS)
    return {"x": [x[i] for i in keep], "y": [round(float(y[i]), 5) for i in keep]}


def training(found: dict[str, list[dict]], tag: str) -> dict[str, Any]:
    """The curves of each stage: loss (or reward), learning rate, validation."""
    stages = []
    for stage, rows in found.items():
        name = next((n for n in ("loss", "reward") if len(report.steps(rows, n)[0]) > 1), None)
        if name is None:
            continue
        vocab = next((r["plan"].get("config", {}).get("vocab_size") for r in rows if r["kind"] == "plan"), None)
        last = report.scores(rows)
        stages.append({
            "stage": stage, "unit": report.CURVES[name][1], "raw": thin(*report.steps(rows, name)),
            "smooth": thin(*report.steps(rows, "smooth_loss")), "lr": thin(*report.steps(rows, "lr")),
            "val_bpb": thin(*report.evals(rows, "val_bpb")), "minutes": round(report.seconds(rows) / 60, 4),
            "chance": round(math.log(vocab), 4) if vocab else None, "final": last.get("val_bpb"),
        })  # fmt: skip
    if not stages:
        raise UserError(f"The records of {tag} hold no training steps: train first.")
    return {"tag": tag, "stages": stages}


def run_point(tag: str, rows: list[dict]) -> dict[str, Any] | None:
    """A finished base run as a point of the scaling picture."""
    plan = next((row["plan"] for row in reversed(rows) if row["kind"] == "plan"), None)
    bpb = report.scores(rows).get("val_bpb")
    if plan is None or bpb is None or not any(row["kind"] == "summary" for row in rows):
        return None
    return {"tag": tag, "depth": plan["config"]["n_layer"], "parameters": plan["parameters"]["total"],
            "tokens": plan["tokens"], "flops": plan["flops"], "bpb": round(bpb, 5)}  # fmt: skip


def fit(points: list[tuple[float, float]]) -> dict[str, Any] | None:
    """The power law y = a x^b through the points, with its residuals; None for fewer than three."""
    if len({x for x, _ in points}) < 3:
        return None
    law = plots.fit(*map(list, zip(*points)))
    return {"a": law.a, "b": law.b, "residuals": [round(residual, 5) for residual in law.residuals]}


def best_at_each_budget(runs: list[dict]) -> list[dict]:
    """Of the runs that spent about as much (within a tenth), the one with the lowest bpb: the compute frontier."""
    best: list[dict] = []
    for run in sorted(runs, key=lambda r: r["flops"]):
        if best and run["flops"] < 1.1 * best[-1]["flops"]:
            best[-1] = min(best[-1], run, key=lambda r: r["bpb"])
        else:
            best.append(run)
    return best


def scaling_props(records: dict[str, list[dict]], vocab_size: int) -> dict[str, Any]:
    """All finished base runs, the frontier with its power law, and what the plan asks for at each depth."""
    runs = sorted((p for tag, rows in records.items() if (p := run_point(tag, rows))), key=lambda p: p["flops"])
    best = best_at_each_budget(runs)
    plans = [scaling.plan(depth, vocab_size=vocab_size) for depth in DEPTHS]
    return {
        "runs": runs,
        "best": [run["tag"] for run in best],
        "law": fit([(run["flops"], run["bpb"]) for run in best]),
        "plan": [{"depth": plan.config.n_layer, "parameters": plan.parameters["total"], "tokens": plan.tokens,
                  "batch": plan.batch, "flops": plan.flops} for plan in plans],
        "vocab_size": vocab_size,
    }  # fmt: skip


# -- output ------------------------------------------------------------------------------------------------------------


def main(cfg: Config) -> dict:
    """Write the files; returns {"folder", "files"}."""
    if cfg.source not in checkpoint.FOLDERS:
        raise UserError(f"-i {cfg.source} is not a stage: use {', '.join(checkpoint.FOLDERS)}.")
    path = checkpoint.find(cfg.source, cfg.model_tag or None, None if cfg.step == -1 else cfg.step)
    tag = path.parent.name
    model, tokenizer, _ = checkpoint.build_model(path)
    stages = {name: rows for name, rows in report.collect(paths.base_dir(), tag).items() if name != "tok"}
    records = sorted(checkpoint.folder("base").glob(f"{cfg.prefix}*/record.jsonl"))
    props = {
        "TransformerArchitecture": architecture(model, tag),
        "TrainingLoss": training(stages, tag),
        "AttentionVisualization": attention_props(model, tokenizer, cfg.prompt, tag),
        "ScalingLaws": scaling_props({p.parent.name: record.read(p) for p in records}, model.config.vocab_size),
    }
    folder = Path(cfg.output) if cfg.output else paths.base_dir() / "visualize"
    files = []
    for name, value in props.items():
        paths.write_json(folder / f"{name}.json", record.plain(value))
        files.append(f"{name}.json")
        if cfg.png:
            pictures.draw(name, value, folder / f"{name}.png")
            files.append(f"{name}.png")
    print(f"{folder}: {', '.join(files)}")
    return {"folder": str(folder), "files": files}


if __name__ == "__main__":
    cli.run(main, Config)
