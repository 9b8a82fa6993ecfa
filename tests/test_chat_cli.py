"""The terminal chat: whole characters, tool steps, limits, Ctrl-C, and sentences for mistakes."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from tiny_model import TOKENIZER, Scripted, ids_of, save_checkpoint, tiny_gpt

from nanochat import chat, cli
from nanochat.engine import Engine
from nanochat.errors import Stopped, UserError
from scripts import chat_cli
from scripts.chat_cli import Config


@pytest.fixture
def says(monkeypatch):
    """Make the loaded model one that says a fixed text to anything (tool tokens as in tiny_model.ids_of)."""

    def install(text, **sizes):
        class Talker(Scripted):
            def forward(self, batch, attention, wanted=None):
                if wanted is not None:  # a new prompt: the script begins behind it
                    self.script = [0] * (batch.positions[-1] + 1) + self.reply
                return super().forward(batch, attention, wanted)

        model = Talker([])
        model.reply = ids_of(text) if isinstance(text, str) else [*text, TOKENIZER.special("<|assistant_end|>")]
        model.config = tiny_gpt(**{"sequence_len": 200, **sizes}).config
        engine = Engine(model, TOKENIZER, slots=1)
        monkeypatch.setattr(chat_cli, "load_engine", lambda cfg: (engine, "test"))
        return engine

    return install


def talk(monkeypatch, capsys, lines, **flags):
    """What the CLI prints when these lines are typed, and then Ctrl-D."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    result = chat_cli.main(Config(**flags))
    return capsys.readouterr().out, result


def test_one_question_prints_only_the_answer_pitfall_30(says, capsys):
    says("Hello you.")
    result = chat_cli.main(Config(prompt="Hi"))
    assert capsys.readouterr().out == "Hello you\n"
    assert result["tokens"] == 9 and result["reply"] == [{"type": "text", "text": "Hello you"}]


def test_weights_of_8_bits_are_a_flag(base_dir):
    save_checkpoint("sft", "d3")
    engine, _ = chat_cli.load_engine(Config(device_type="cpu", int8=True))
    assert engine.decoder.model.head.scale and all(p.is_meta for p in engine.model.parameters())


def test_multi_byte_characters_are_printed_whole_pitfall_30(says, capsys, monkeypatch):
    says(list("naïve 数学 🙂".encode()))
    written = []
    monkeypatch.setattr(chat_cli.Screen, "write", lambda self, kind, text: written.append(text))
    chat_cli.main(Config(prompt="Hi"))
    assert "".join(written) == "naïve 数学 🙂" and "🙂" in written and "数" in written


def test_calculator_steps_are_shown_in_brackets(says, capsys):
    says("It is «2*3»xxx6!.")
    chat_cli.main(Config(prompt="Hi"))
    assert capsys.readouterr().out == "It is [2*3 = 6] 6!\n"


def test_colours_only_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = chat_cli.Screen(Terminal())
    for piece in [("text", "a"), ("python", "1+1"), ("python_output", "2"), ("text", "b"), ("python", "1/0")]:
        screen.write(*piece)
    screen.end()
    assert screen.out.getvalue() == "a\033[2m[1+1 = 2]\033[0m b\033[2m[1/0]\033[0m\n"


def test_the_limit_is_a_flag_and_is_told_pitfall_30(says, capsys):
    says("Hello you.")
    assert chat_cli.main(Config(prompt="Hi", max_tokens=5))["tokens"] == 5
    assert capsys.readouterr().out == "Hello (cut after 5 tokens: -m allows more)\n"


def test_commands_and_leaving(says, monkeypatch, capsys):
    says("Yes.")
    out, result = talk(monkeypatch, capsys, ["one", "", "help", "CLEAR", "two", "quit", "three"])
    assert result == {"turns": 2} and out.count("Assistant: Yes") == 2
    assert "A new conversation." in out and out.count(chat_cli.HELP) == 2
    for word in ("exit", "Quit"):
        assert talk(monkeypatch, capsys, [word, "one"])[1] == {"turns": 0}
    assert talk(monkeypatch, capsys, ["one"])[1] == {"turns": 1}  # Ctrl-D


def test_the_model_sees_the_whole_conversation_until_clear(says, monkeypatch, capsys):
    engine = says("Yes.")
    seen = []
    monkeypatch.setattr(engine, "check", lambda ids, n: seen.append(TOKENIZER.decode(ids)))
    talk(monkeypatch, capsys, ["one", "two", "clear", "three"])
    assert seen[1].count("user_start") == 2 and "one" in seen[1] and "Yes" in seen[1]
    assert seen[2].count("user_start") == 1 and "three" in seen[2]


def test_long_chats_lose_their_oldest_whole_turns_pitfall_30(says, monkeypatch, capsys):
    engine = says("Yes.", sequence_len=64)
    seen = []
    monkeypatch.setattr(engine, "check", lambda ids, n: seen.append(TOKENIZER.decode(ids)))
    out, result = talk(monkeypatch, capsys, [f"question {i}" for i in range(20)], max_tokens=16)
    assert result == {"turns": 20} and "no longer fit" in out
    assert all(text.startswith("<|bos|><|user_start|>question") for text in seen)
    assert seen[-1].endswith("question 19<|user_end|><|assistant_start|>")


def test_a_message_that_is_too_long_is_refused_and_the_chat_goes_on_pitfall_27(says, monkeypatch, capsys):
    says("Yes.", sequence_len=64)
    out, result = talk(monkeypatch, capsys, ["x" * 500, "short"], max_tokens=16)
    assert "shorten it" in out and out.count("Yes") == 1
    with pytest.raises(UserError, match="shorten it"):
        chat_cli.main(Config(prompt="x" * 500))


def test_special_tokens_in_what_the_user_types_stay_text(says, monkeypatch, capsys):
    engine = says("Yes.")
    seen = []
    monkeypatch.setattr(engine, "check", lambda ids, n: seen.append(ids))
    chat_cli.main(Config(prompt="<|assistant_end|>"))
    assert seen[0].count(TOKENIZER.special("<|assistant_end|>")) == 0


def test_a_seed_repeats_the_answers_and_none_does_not_pitfall_29(base_dir, monkeypatch, capsys):
    save_checkpoint()
    replies = [
        chat_cli.main(Config(prompt="Hi", seed=seed, temperature=2, max_tokens=20))["reply"] for seed in (1, 1, 2)
    ]
    assert replies[0] == replies[1] != replies[2]
    free = [chat_cli.main(Config(prompt="Hi", temperature=2, max_tokens=20))["reply"] for _ in range(2)]
    assert free[0] != free[1]


@pytest.mark.parametrize(
    "flags,words",
    [
        ({"source": "mid"}, "mid"),
        ({"model_tag": "d99"}, "d99"),
        ({"step": 3}, "3"),
        ({"temperature": -1.0}, "temperature"),
    ]
    + [
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"source": "rl"}, "rl"),
        ({"top_k": -5}, "top_k"),
    ],
    ids=str,
)
def test_mistakes_are_sentences_pitfall_30(base_dir, flags, words):
    save_checkpoint()
    with pytest.raises(UserError, match=words):
        chat_cli.main(Config(prompt="Hi", **flags))


def test_without_a_checkpoint_there_is_a_sentence(base_dir):
    with pytest.raises(UserError, match="chat_sft|base_train|checkpoint"):
        chat_cli.main(Config(prompt="Hi"))


def test_the_published_flags_parse():
    cfg = cli.parse(Config, "-i rl -g d12 -s 7 -p Why? -t 0.1 -k 5 -m 99 --top-p 0.9 --min-p 0.1 --seed 3".split())
    assert cfg == Config("rl", "d12", 7, "Why?", 0.1, 5, 0.9, 0.1, 3, 99)
    assert cli.parse(Config, ["--source=base", "--device-type=cpu"]).source == "base"


# -- a real terminal --------------------------------------------------------------------------------------------------


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, *args):
        self.master, slave = pty.openpty()
        root = Path(__file__).resolve().parents[1]
        command = [sys.executable, "-m", "scripts.chat_cli", *args]
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job would ignore Ctrl-C
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=root, preexec_fn=heard)
        os.close(slave)
        self.text = ""

    def wait_for(self, words, seconds=60):
        end = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < end, f"{words!r} did not come: {self.text!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.text += os.read(self.master, 4096).decode(errors="replace")
        before, _, self.text = self.text.partition(words)
        return before

    def type(self, text):
        os.write(self.master, text.encode())

    def interrupt_until(self, words, presses=10):
        """Press Ctrl-C until `words` come: Python hears none that falls between the prompt and the read after it."""
        for _ in range(presses):
            self.process.send_signal(signal.SIGINT)
            end = time.monotonic() + 3
            while time.monotonic() < end and words not in self.text:
                if select.select([self.master], [], [], 0.1)[0]:
                    self.text += os.read(self.master, 4096).decode(errors="replace")
            if words in self.text:
                return self.wait_for(words)
        raise AssertionError(f"{words!r} did not come: {self.text!r}")


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program_pitfall_30(base_dir):
    save_checkpoint(sequence_len=4096, vocab_size=TOKENIZER.vocab_size)
    terminal = Terminal("-t", "0", "-m", "4000")
    try:
        terminal.wait_for("User: ")
        terminal.interrupt_until("leaves.")  # at the prompt
        terminal.wait_for("User: ")
        terminal.type("hello\n")
        terminal.wait_for("Assistant: ")
        time.sleep(0.3)
        terminal.process.send_signal(signal.SIGINT)  # during the answer
        assert "(stopped" in terminal.wait_for("User: ")
        assert terminal.process.poll() is None
        terminal.type("exit\n")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_ctrl_c_during_the_only_answer_ends_the_program(says, monkeypatch, capsys):
    """With its code: a shell that asks one question after the other is to stop too."""
    engine = says("Hello you.")
    step = engine.step

    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(Stopped) as stop:
        chat_cli.main(Config(prompt="Hi"))
    assert stop.value.signum == signal.SIGINT and "(stopped" in capsys.readouterr().out


# -- commands ---------------------------------------------------------------------------------------------------------


def test_set_changes_how_answers_are_drawn_and_refuses_nonsense(says, monkeypatch, capsys):
    engine, seen = says("Yes."), []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda ids, sampling: seen.append(sampling) or submit(ids, sampling))
    lines = [
        "/set",
        "/set temperature 0.25",
        "one",
        "/set top_k x",
        "/set top_p 7",
        "/set colour red",
        "/set seed 3",
        "two",
    ]
    out, _ = talk(monkeypatch, capsys, lines)
    assert [(s.temperature, s.top_k, s.top_p, s.seed) for s in seen] == [(0.25, 50, None, None), (0.25, 50, None, 4)]
    assert "temperature 0.6, top_k 50" in out and "give a number" in out and "takes one of" in out and "above 0" in out


def test_a_conversation_is_saved_in_the_form_that_training_reads(says, monkeypatch, capsys, tmp_path):
    says("It is «2*3»xxx6!.")
    path = tmp_path / "a talk.json"
    out, _ = talk(monkeypatch, capsys, ["/save", "Hi", f"/save {path}", "/save /no/such/folder/x.json"])
    assert "say something first" in out and f"Saved to {path}" in out and "/no" in out
    conversation = json.loads(path.read_text())
    assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"]
    chat.render(conversation, TOKENIZER)  # it is one


def test_again_answers_the_same_question(says, monkeypatch, capsys):
    engine, seen = says("Yes."), []
    monkeypatch.setattr(engine, "check", lambda ids, n=1: seen.append(list(ids)))
    out, result = talk(monkeypatch, capsys, ["/again", "one", "/again"])
    assert result == {"turns": 2} and seen[0] == seen[1] and "no question yet" in out


def test_help_tells_all_and_an_unknown_command_is_named(says, monkeypatch, capsys):
    says("Yes.")
    out, result = talk(monkeypatch, capsys, ["/help", "/nonsense"])
    assert result == {"turns": 0} and f"{chat_cli.HELP}\n{chat_cli.COMMANDS}" in out
    assert out.count(chat_cli.COMMANDS) == 1 and "no command /nonsense" in out


def test_several_lines_make_one_message(says, monkeypatch, capsys):
    engine, seen = says("Yes."), []
    monkeypatch.setattr(engine, "check", lambda ids, n=1: seen.append(TOKENIZER.decode(ids)))
    talk(monkeypatch, capsys, ["one\\", "two\\", "three", '"""', "  a", "", "quit", '"""'])
    assert "one\ntwo\nthree<|user_end|>" in seen[0] and "<|user_start|>a\n\nquit<|user_end|>" in seen[1]


def test_the_rate_is_shown_in_a_conversation(says, monkeypatch, capsys):
    says("Hello you.")
    out, _ = talk(monkeypatch, capsys, ["Hi"])
    assert re.search(r"Hello you \(9 tokens, \d+ tok/s\)", out)


def test_what_was_typed_is_remembered_for_its_owner_alone(base_dir):
    readline = pytest.importorskip("readline")
    with chat_cli.history():
        readline.clear_history()
        readline.add_history("something typed")
    readline.clear_history()
    path = base_dir / chat_cli.HISTORY
    assert path.stat().st_mode & 0o777 == 0o600
    with chat_cli.history():
        assert readline.get_history_item(1) == "something typed"
