"""Before a Bash command: block (exit 2) a pretraining launch whose estimated memory is more than the machine has."""

import sys

import common

SHARE = 0.95  # of the memory; the estimate is not exact, so only what is clearly too much is blocked


def room() -> tuple[int, str]:
    """Bytes of one device for training, and its name."""
    import psutil
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return device.total_memory, device.name
    return psutil.virtual_memory().available, "this machine's free memory"


def problem(launch: common.Launch) -> str | None:
    """Why this launch cannot fit, with the remedy; None if it may."""
    sys.path.insert(0, str(common.ROOT))
    import torch

    from nanochat import cli, cost
    from nanochat.errors import UserError
    from nanochat.tokenizer import Tokenizer, tokenizer_path
    from scripts import base_train

    try:
        cfg = cli.parse(base_train.Config, launch.flags)
        vocab = Tokenizer.load().vocab_size if tokenizer_path().exists() else 32768
        plan = base_train.make_plan(cfg, vocab, launch.world)
    except (SystemExit, UserError, ValueError):
        return None  # a wrong flag: the program itself says so, better than we could
    total, name = room()
    shared = 1 if torch.cuda.is_available() else launch.world  # CPU ranks share one memory
    options = {"world": launch.world, "accum": plan.accum, "shard": cfg.shard, "recompute": cfg.recompute}
    options |= {"device": "cuda"} if torch.cuda.is_available() else {"device": "cpu", "bytes_per_value": 4}
    need = cost.memory(plan.config, plan.device_batch_size, **options)["total"] * shared
    if need <= SHARE * total:
        return None
    fits = cost.largest_rows(plan.config, int(SHARE * total / shared), **options)
    remedy = f"--device-batch-size={fits} fits" if fits else "no batch of this depth fits: give a smaller --depth"
    return (
        f"This launch needs about {need / 2**30:.1f} GiB at {plan.device_batch_size} rows "
        f"and {name} has {total / 2**30:.1f}: {remedy} (python -m scripts.plan --depth={cfg.depth})."
    )


def main() -> int:
    """2 with the reason on stderr for a launch that cannot fit, else 0."""
    for launch in common.launches(common.shell_command(common.event())):
        found = problem(launch) if launch.module == "scripts.base_train" else None
        if found:
            print(found, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
