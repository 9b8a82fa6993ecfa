"""Before a Bash command: warn when the disk of the artefact folder may not hold the run's checkpoints."""

import sys

import common

KEPT_AND_NEW = 3  # checkpoints at once: the two that are kept by default, and the one being written
LEAST = 2 * 2**30  # bytes that should stay free whatever the model's size


def needed(launch: common.Launch) -> int:
    """Bytes that the run's checkpoints take, roughly: weights and optimizer, three times."""
    sys.path.insert(0, str(common.ROOT))
    from nanochat import cli, cost
    from nanochat.errors import UserError
    from scripts import base_train

    if launch.module != "scripts.base_train":
        return LEAST
    try:
        plan = base_train.make_plan(cli.parse(base_train.Config, launch.flags), 32768, launch.world)
    except (SystemExit, UserError, ValueError):
        return LEAST
    part = cost.memory(plan.config, 1)
    return max(LEAST, KEPT_AND_NEW * (part["weights"] + part["optimizer"]))


def main() -> int:
    """Always 0: the command may run."""
    found = common.launches(common.shell_command(common.event()))
    if not found:
        return 0
    sys.path.insert(0, str(common.ROOT))
    from nanochat import paths

    need, folder = max(map(needed, found)), paths.base_dir()
    free = paths.free_bytes(folder)
    if free < need:
        common.warn(
            f"{folder} has {free / 2**30:.1f} GiB free and this run's checkpoints may take {need / 2**30:.1f}: free "
            "some space, lower --keep, or set NANOCHAT_BASE_DIR to another disk."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
