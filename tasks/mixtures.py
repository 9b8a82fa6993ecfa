"""What a model is fine-tuned and reinforced on, by the corpus it was pretrained on.

A model pretrained on the embedded world learns to talk in it; any other gets the published diet: SmolTalk, MMLU, GSM8K,
spelling, and conversations about itself where there are any.
"""

from tasks import common
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.tinyworld import TinyWorldSums, TinyWorldTalk

TINYWORLD_TALKS = 200_000  # an epoch: more than a small run sees, so nothing is seen twice
TINYWORLD_SUMS = 4096  # problems for reinforcement


def sft(dataset: str, *, mmlu_epochs: int = 3, gsm8k_epochs: int = 4, identity: str = "") -> tuple:
    """(training mixture, validation mixture) for a model pretrained on `dataset`. Sizes as published."""
    own = [CustomJSON(identity)] * 2 if identity else []
    if dataset == "tinyworld":
        return common.TaskMixture([TinyWorldTalk("train", TINYWORLD_TALKS), *own]), TinyWorldTalk("test", 2000)
    mmlu = [MMLU("auxiliary_train")] * mmlu_epochs if mmlu_epochs else []  # what is not wanted is not asked for
    gsm8k = [GSM8K("main", "train")] * gsm8k_epochs if gsm8k_epochs else []
    train = [SmolTalk("train"), *mmlu, *gsm8k]
    spelling = [SimpleSpelling("train", 200_000), SpellingBee("train", 80_000)]
    held_out = [SmolTalk("test"), MMLU("test", stop=5200), GSM8K("main", "test", stop=420)]
    return common.TaskMixture([*train, *spelling, *own]), common.TaskMixture(held_out)


def rl(task: str) -> tuple[common.Task, common.Task]:
    """(problems to learn from, held-out problems): tinyworld's sums for "tinyworld", else GSM8K."""
    if task == "tinyworld":
        return TinyWorldSums("train", TINYWORLD_SUMS), TinyWorldSums("test", 400)
    return GSM8K("main", "train"), GSM8K("main", "test")
