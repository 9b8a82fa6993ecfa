"""Measure the tokenizer: bytes per token, beside GPT-2's and GPT-4's vocabularies where tiktoken can fetch them.

    python -m scripts.tok_eval

Seconds on any CPU. More bytes a token mean fewer tokens for the same text: cheaper training and a longer view. Every
text must come back unchanged. What to expect of a vocabulary of 32,768 trained on English: near GPT-2 (50,257) on
English, behind GPT-4 (100,277) on everything, far behind on Korean, which it has hardly seen.
"""

from dataclasses import dataclass

from nanochat import cli, dataset
from nanochat.errors import UserError
from nanochat.paths import base_dir
from nanochat.record import Record
from nanochat.tokenizer import BUILTINS, Tokenizer

SAMPLE_CHARS = 1_000_000  # of the corpus, from each split: steady to the third digit

NEWS = """
The ferry that has linked the two halves of Harrow Bay since 1931 made its last crossing on Tuesday evening, a day after
the council opened the new bridge to traffic. About 400 people queued in the rain for a place on board, some of them
holding photographs of grandparents who had worked on the line. "It was never fast," said Ellen Marsh, 74, who sold
tickets at the eastern pier for 22 years, "but nobody was ever in a hurry once they were on the water." The operator,
which carried 1.2 million passengers in its best year, said it had been losing roughly $90,000 a month since January.
The boat itself may yet be saved: a museum in the capital has offered to take it, provided that the town pays for the
tow. Councillors are expected to vote on the proposal next week.
"""

KOREAN = """
우리 동네 도서관은 언덕 위에 있어서 창가에 앉으면 강과 다리가 한눈에 내려다보인다. 토요일 아침이면 아이들이
커다란 가방을 메고 계단을 올라와 그림책을 한 아름씩 빌려 간다. 지난달에는 오래된 지하 창고를 고쳐 작은 작업실을
열었는데, 이제는 누구나 그곳에서 나무를 깎거나 낡은 라디오를 고칠 수 있다. 처음에는 시끄럽다고 걱정하던 사람들도
요즘은 차를 들고 구경하러 온다. 사서 선생님은 책을 읽는 일과 손으로 무언가를 만드는 일이 그리 다르지 않다고
말씀하신다. 둘 다 천천히, 한 번에 한 쪽씩, 한 조각씩 해 나가야 하기 때문이다.
"""

CODE = '''
import heapq
from collections import defaultdict


class Roads:
    """Towns joined by two-way roads, each with a length in kilometres."""

    def __init__(self):
        self.next = defaultdict(dict)

    def join(self, a: str, b: str, km: float) -> None:
        if km < 0:
            raise ValueError(f"a road can't be {km} km long")
        self.next[a][b] = self.next[b][a] = min(km, self.next[a].get(b, float("inf")))

    def distance(self, start: str, goal: str) -> float | None:
        queue, done = [(0.0, start)], set()
        while queue:
            far, town = heapq.heappop(queue)
            if town == goal:
                return far
            if town in done:
                continue
            done.add(town)
            for other, km in self.next[town].items():
                if other not in done:
                    heapq.heappush(queue, (far + km, other))
        return None


if __name__ == "__main__":
    roads = Roads()
    for a, b, km in [("Ayr", "Bow", 7), ("Bow", "Cam", 3.5), ("Ayr", "Cam", 12)]:
        roads.join(a, b, km)
    assert roads.distance("Ayr", "Cam") == 10.5
'''

MATH = r"""
\begin{theorem}
For every integer $n \ge 1$ we have $\sum_{k=1}^{n} k^3 = \left(\frac{n(n+1)}{2}\right)^2$.
\end{theorem}
\begin{proof}
We use induction on $n$. For $n = 1$ both sides are $1$. Assume the claim for $n$; then
\begin{align*}
\sum_{k=1}^{n+1} k^3 &= \frac{n^2(n+1)^2}{4} + (n+1)^3 \\
  &= \frac{(n+1)^2\,(n^2 + 4n + 4)}{4} = \left(\frac{(n+1)(n+2)}{2}\right)^2,
\end{align*}
which is the claim for $n + 1$. Geometrically, the $L$-shaped border that enlarges a square of side $T_n = n(n+1)/2$ to
one of side $T_{n+1}$ has area $T_{n+1}^2 - T_n^2 = (n+1)^3$. For example, $1 + 8 + 27 + 64 = 100 = 10^2$.
\end{proof}
"""

SCIENCE = """
Lichens are not single organisms but partnerships: a fungus builds the body and shelters algae or cyanobacteria, which
in return feed it with sugars made by photosynthesis. Because the pair takes water and minerals straight from rain and
air, it can settle on bare granite, on bark, even on painted metal, and it concentrates whatever the air carries. That
makes lichens useful as instruments. After sulphur dioxide emissions fell in the 1980s, ecologists followed the return
of sensitive species such as Usnea into city parks and could map the improvement street by street. Growth is slow, often
0.5 to 2 mm a year, so the diameter of the largest specimen of Rhizocarpon geographicum on a boulder gives an estimate,
accurate to about 10 %, of the time since a glacier uncovered it.
"""

TEXTS = {"news": NEWS, "korean": KOREAN, "code": CODE, "math": MATH, "science": SCIENCE}


@dataclass(frozen=True)
class Config:
    """Flags of tok_eval."""

    dataset: str = ""  # corpus to sample; empty: the one that the tokenizer was trained on
    val_shard: str = ""  # a folder's validation shard; empty: the usual one


def sample(corpus, split: str) -> str:
    """The first documents of a split, joined by line breaks, up to SAMPLE_CHARS characters and one pass."""
    texts, chars = [], 0
    for _, documents in corpus.epoch_batches(split):
        texts += [text for _, text in documents]
        chars += sum(len(text) for _, text in documents)
        if chars >= SAMPLE_CHARS:
            break
    return "\n".join(texts)[:SAMPLE_CHARS]


def tokenizers(ours: Tokenizer) -> tuple[dict[str, Tokenizer], dict[str, str]]:
    """Ours and the built-in ones that can be had; for each of the others, the sentence why not."""
    found, missing = {"ours": ours}, {}
    for name in BUILTINS:
        try:
            found[name] = Tokenizer.builtin(name)
        except UserError as error:
            missing[name] = str(error)
    return found, missing


def bytes_per_token(tokenizer: Tokenizer, text: str) -> float:
    """UTF-8 bytes of `text` per token of it; a text that does not come back unchanged is a defect."""
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:
        raise RuntimeError(f"The tokenizer {tokenizer.encoding.name} does not give back the text it was given.")
    return len(text.encode("utf-8")) / len(ids)


def table(results: dict[str, dict[str, float]], sizes: dict[str, int]) -> str:
    """Bytes per token, a row per text and a column per tokenizer, with our lead in percent over each other one."""
    names = list(results)
    lines = [f"{'bytes per token':<16}" + "".join(f"{f'{name} ({sizes[name]:,})':>24}" for name in names)]
    for text, ours in results["ours"].items():
        cells = [f"{ours:>24.3f}"]
        for name in names[1:]:
            cells.append(f"{results[name][text]:.3f} ({100 * (ours / results[name][text] - 1):+.1f} %)".rjust(24))
        lines.append(f"{text:<16}" + "".join(cells))
    return "\n".join(lines)


def main(cfg: Config) -> dict:
    """Measure and print; returns {"bytes_per_token": {tokenizer: {text: ratio}}, "missing": {tokenizer: why}, ...}."""
    # 1. tokenizer and corpus
    ours = Tokenizer.load()
    corpus = dataset.open_inherited(ours.meta.get("dataset"), cfg.dataset, cfg.val_shard)
    samples = {split: sample(corpus, split) for split in dataset.SPLITS}
    texts = TEXTS | {split: text for split, text in samples.items() if text}  # of empty files nothing can be said

    # 2. measure
    found, missing = tokenizers(ours)
    results = {
        name: {label: bytes_per_token(tokenizer, text) for label, text in texts.items()}
        for name, tokenizer in found.items()
    }
    sizes = {name: tokenizer.vocab_size for name, tokenizer in found.items()}

    # 3. summary
    record = Record(base_dir() / "tokenizer" / "record.jsonl", stage="tok_eval", config=cfg)
    record.say(table(results, sizes))
    for sentence in missing.values():
        record.say(sentence)
    summary = {"bytes_per_token": results, "vocab_size": sizes, "missing": missing, "dataset": corpus.identity}
    record.close(**summary)
    return summary


if __name__ == "__main__":
    cli.run(main, Config)
