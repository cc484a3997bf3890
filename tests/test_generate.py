"""The command that continues a text: what it prints, how it streams, and the one line that mistakes get."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from test_cache import Recall, recall
from test_imports import modules
from test_readme import ROOT, blocks
from zoo.core import sampling
from zoo.generate import main, visible
from zoo.models import MODELS
from zoo.tasks import TASKS
from zoo.tasks.text.corpus import START
from zoo.training.checkpoint import SCHEMA

__all__ = ["recall"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Untrained models of text, of a context and of noise, saved."""
    folder, saved = tmp_path_factory.mktemp("checkpoints"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "recall", Recall)
        for task in ("text", "recall", "noise"):
            torch.manual_seed(0)
            model = MODELS["hypernet"](
                model={"name": "hypernet", "dim": 16, "layers": 2, "heads": 2, "hidden": 24, "code_dim": 8},
                task={"name": task},
                optim={},
            )
            content = {
                "zoo": {"schema": SCHEMA},
                "hyper_parameters": dict(model.hparams),
                "state_dict": model.state_dict(),
            }
            torch.save(content, folder / f"{task}.ckpt")
            saved[task] = str(folder / f"{task}.ckpt")
    return saved


def test_the_command_prints_what_the_loaded_model_generates(
    checkpoints: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for seed in ("3", "3", "4"):
        assert main([checkpoints["text"], "Ünder", "--count", "30", "--seed", seed]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    model, prompt = zoo.load(checkpoints["text"]), [START, *"Ünder".encode()]
    generator = torch.Generator().manual_seed(3)
    found = [int(token) for token in model.generate(torch.tensor([prompt]), 30, 0, 0.8, 40, generator)]
    assert START not in found
    expected = "Ünder" + bytes(found).decode(errors="replace") + "\n"
    assert len(printed[0]) == len(expected)
    assert all(a == b or (a == "\ufffd" and not b.isprintable()) for a, b in zip(printed[0], expected, strict=True))


def scripted(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    stream = iter(numbers)
    monkeypatch.setattr(sampling, "choose", lambda *_: torch.tensor([next(stream)]))


def test_text_is_streamed_and_ends_at_the_start_of_a_document(
    checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Stream())
    scripted(monkeypatch, 65, 0xC3, 0xA9, 0xFF, 0x1B, 9, 0xE2, 0x82, START, 66)
    assert main([checkpoints["text"], "", "--count", "10"]) == 0
    # é comes with its second byte; FF is no UTF-8, ESC would command the terminal, E2 82 is cut short
    assert [text for text in written if text] == ["A", "é", "\ufffd", "\ufffd", "\t", "\ufffd", "\n"]


def test_the_context_reaches_the_model(
    checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "context.txt").write_text("someß")
    outputs = []
    for context in ("someß", f"@{tmp_path / 'context.txt'}", "other"):
        assert main([checkpoints["recall"], "ab", "--context", context, "--count", "20", "--temperature", "0"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    model = zoo.load(checkpoints["recall"])
    tokens = torch.tensor([[*"someß".encode(), START, *b"ab"]])
    generated = [int(token) for token in model.generate(tokens, 20, 6)]
    assert outputs[0].startswith("ab" + bytes(generated[:1]).decode(errors="replace"))


ANSWERS = [
    (["runs/nothing", "a"], "no checkpoint at runs/nothing: give a .ckpt file, or a run folder"),
    ([__file__, "a"], "is damaged or no checkpoint"),
    (["noise", "a"], "task.name=noise has no text: give a model that was trained on text or prompts"),
    (["recall", "a"], "task.name=recall with a separate context: give --context"),
    (["text", "a", "--context", "b"], "task.name=text without a separate context: leave out --context"),
    (["recall", "a", "--context", "@missing.txt"], "No such file or directory: 'missing.txt'"),
    (["recall", "a", "--context", "@LATIN"], "is no UTF-8 text: "),
    (["text", "a", "--count", "0"], "count=0 must be at least 1"),
    (["text", "a", "--temperature", "-1"], "temperature=-1.0 must be"),
    (["text", "a", "--top-k", "0"], "top_k=0 must lie"),
    (["text", "a", "--seed", str(10**30)], f"--seed {10**30} must be a number of 64 bits"),
    (["text", "\udcff"], "argument prompt: invalid utf8 value"),
    (["text"], "give a prompt, or --prompts FILE and --out FILE"),
    (["text", "a", "--prompts", "p", "--out", "o"], "give a prompt, or --prompts FILE and --out FILE"),
    (["text", "--prompts", "p"], "give a prompt, or --prompts FILE and --out FILE"),
    (["text", "--prompts", "p", "--out", "./p"], "--out ./p holds the prompts: give another file"),
    (["text", "--prompts", "p", "--out", "o", "--context", "c"], "give it in each row of --prompts"),
    (["text", "--prompts", "missing.jsonl", "--out", "o"], "No such file or directory: 'missing.jsonl'"),
]


@pytest.mark.parametrize(("arguments", "answer"), ANSWERS)
def test_mistakes_get_one_line_and_exit_code_2(
    arguments: list[str], answer: str, checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9")
    arguments = [checkpoints.get(a, a).replace("LATIN", str(tmp_path / "latin")) for a in arguments]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert answer in line


def test_ctrl_c_stops_it_like_any_command(
    checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> Iterator[Tensor]:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "choose", interrupted)
    assert main([checkpoints["text"], "ab"]) == 130
    assert capsys.readouterr() == ("ab", "\nstopped by SIGINT\n")


def test_help_loads_no_torch_and_unknown_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import runpy; sys.argv = ['generate', '--help']; runpy.run_module('zoo.generate', run_name='__main__')"
    loaded, printed = modules(code)
    assert "torch" not in loaded
    assert "python -m zoo.generate [-h]" in printed
    assert main(["--count", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the following arguments are required: checkpoint; python -m zoo.generate -")
    assert len(error.splitlines()) == 1


def test_a_file_of_prompts(checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In any order of lengths and in any batch, a prompt is continued as it is alone."""
    prompts, out = ["ab", "longer than", "cd", "", "ef\u00fc"], tmp_path / "out.jsonl"
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(prompts), encoding="utf-8")
    table = tmp_path / "prompts.jsonl"
    table.write_text("".join(json.dumps({"prompt": text, "context": f"c{text}"}) + "\n" for text in prompts))
    greedy = ["--count", "20", "--temperature", "0"]
    for task, file in (("text", lines), ("recall", table)):
        assert main([checkpoints[task], "--prompts", str(file), "--out", str(out), *greedy]) == 0
        printed = capsys.readouterr()
        assert printed.out == ""
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["prompt"] for row in rows] == prompts
        total = 0
        for row in rows:
            context = ["--context", row["context"]] if task == "recall" else []
            assert main([checkpoints[task], row["prompt"], *context, *greedy]) == 0
            alone = capsys.readouterr()
            assert alone.out == row["prompt"] + "".join(map(visible, row["text"])) + "\n"
            total += int(alone.err.split()[0])
        assert f"{total} tokens in " in printed.err
        assert re.search(r"[\d,]+ tokens/s$", printed.err.strip())


def test_documents_of_a_file_end_where_they_end(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = iter([[65, 66], [START, 67], [68, 68], [69, START]])
    monkeypatch.setattr(sampling, "choose", lambda *_: torch.tensor(next(stream)))
    (tmp_path / "p.txt").write_bytes("\ufeffa\x0c\u2028b\r\nabcd\u00e9\n".encode())  # two lines, equally long
    (tmp_path / "o").symlink_to(tmp_path / "elsewhere")
    assert main([checkpoints["text"], "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "o")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "elsewhere").read_text().splitlines()]
    assert (tmp_path / "o").is_symlink()
    assert rows == [{"prompt": "a\x0c\u2028b", "text": "A"}, {"prompt": "abcd\u00e9", "text": "BCD"}]


def test_sigterm_leaves_no_half_file(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sampling, "choose", lambda *_: signal.raise_signal(signal.SIGTERM))
    (tmp_path / "p.txt").write_text("a")
    assert main([checkpoints["text"], "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "o")]) == 143
    assert capsys.readouterr().err.endswith("\nstopped by SIGTERM\n")
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_nothing_is_written_for_prompts_that_do_not_fit(
    checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "out.jsonl", tmp_path / "folder"
    folder.mkdir()
    files = {
        "p.jsonl": '{"prompt": "a", "context": "b"}\n',
        "q.jsonl": '{"text": "a"}\n',
        "r.jsonl": '{"prompt": "a"}\n',
        "s.jsonl": '{"prompt": "\\ud800"}\n',
        "t.csv": 'prompt\n"a\n',
        "u.txt": "fine",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    cases = [
        ("text", "p.jsonl", out, "leave out context in "),
        ("recall", "q.jsonl", out, "line 1: give a text as prompt"),
        ("recall", "r.jsonl", out, "r.jsonl, line 1"),
        ("text", "s.jsonl", out, "s.jsonl"),
        ("text", "t.csv", out, "t.csv"),
        ("text", "u.txt", folder, "is a folder: give a file"),
        ("text", "u.txt", Path("/dev/null"), "/dev/null is a device: give a file"),
        ("text", "u.txt", tmp_path / "none" / "out", "No such file or directory"),
    ]
    for name, file, where, said in cases:
        assert main([checkpoints[name], "--prompts", str(tmp_path / file), "--out", str(where)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert {path.name for path in tmp_path.iterdir()} == {*files, "folder"}
    assert main([checkpoints["text"], "--prompts", "", "--out", str(out)]) == 2


@pytest.mark.slow
def test_the_command_as_a_process(checkpoints: dict[str, str]) -> None:
    for path, code in ((checkpoints["text"], 0), ("nothing", 2)):
        command = [sys.executable, "-m", "zoo.generate", path, "def ", "--count", "50"]
        done = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=120)
        assert done.returncode == code
        assert (done.stdout.startswith(b"def "), done.stderr.startswith(b"error: ")) == (code == 0, code == 2)


def test_the_page_runs(checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "generate.md").read_text()
    best = tmp_path / "runs" / "transformer-text" / "ID" / "checkpoints" / "best.ckpt"
    best.parent.mkdir(parents=True)
    best.write_bytes(Path(checkpoints["text"]).read_bytes())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in blocks(page, "python"):
        exec(code, names)
    assert names["text"].shape == (2, 40)
