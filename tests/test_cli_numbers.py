"""Numbers of the command line: each has a range that is checked when it is read, by one checker, before all else."""

import argparse
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from face_fusion_pipeline.cli import HelpFormatter, build_parser, commands, main
from face_fusion_pipeline.cli._arguments import Gather, Number, real, whole


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """All arguments of a command and of those below it, with the command's words."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options(below)
        else:
            yield parser.prog.removeprefix("face-fusion").strip(), action


ALL = list(options(build_parser()))
NUMBERS = [(command, action) for command, action in ALL if isinstance(action.type, Number)]


def outside(number: Number) -> list[str]:
    """Values that are not in the range, at its ends and far away."""
    low = number.least if number.above else number.least - (number.step if number.whole else 1e-6)
    high = number.most if number.below else number.most + (number.step if number.whole else 1e-6 * (1 + number.most))
    odd = [str(number.least + 1)] if number.step > 1 else []
    fraction = ["1.5"] if number.whole else []
    far = [str(-(10**30)), str(10**30), "9" * 5000]
    ends = [str(low), str(high)] if number.whole else [f"{low:.15g}", f"{high:.15g}"]
    return ["nan", "inf", "-inf", "1e999", "much", "", " ", *ends, *odd, *fraction, *far]


def test_the_walk_finds_the_commands_and_their_numbers() -> None:
    commands = {command for command, _ in NUMBERS}
    assert {"generate", "sweep", "train", "prepare", "evaluate", "app", "avatars-evaluate table"} <= commands
    assert len(NUMBERS) > 130


@pytest.mark.parametrize("command", sorted({command for command, _ in NUMBERS}))
def test_a_number_that_is_out_of_range_or_none_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for action in (action for of, action in NUMBERS if of == command):
        number, flags = action.type, "/".join(action.option_strings)
        assert isinstance(number, Number)
        for text in outside(number):
            with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"must be {number}, got ")):
                number(text)
        assert main([*command.split(), f"{action.option_strings[0]}=nan"]) == 2
        captured = capsys.readouterr()
        said = f"face-fusion: error: {flags} must be {number}, got nan (see face-fusion {command} --help)\n"
        assert (captured.out, captured.err) == ("", said)


def test_a_number_in_range_is_taken_and_its_range_is_in_the_help() -> None:
    for command, action in NUMBERS:
        number = action.type
        assert isinstance(number, Number)
        for value in (number.least + number.above / 2, number.most - number.below / 2):
            assert number(str(int(value)) if number.whole else f"{value:.15g}") == pytest.approx(value)
        default = action.default if isinstance(action.default, list) else [action.default]
        assert all(number(str(value)) == value for value in default if value is not None), (command, action)
        assert action.help and action.help.strip(), f"without a help text, --help shows no range of {action}"
        assert number.range in (HelpFormatter("face-fusion")._get_help_string(action) or "")


def test_every_number_has_a_checker_and_every_list_adds_up() -> None:
    for command, action in ALL:
        if not action.option_strings:
            continue
        assert action.type not in (int, float), (command, action)
        default = action.default if isinstance(action.default, list) else [action.default]
        is_number = any(isinstance(value, (int, float)) and not isinstance(value, bool) for value in default)
        assert isinstance(action.type, Number) or not is_number, (command, action)
        assert action.nargs != "+" or isinstance(action, Gather), (command, action)


def test_the_words_of_a_range() -> None:
    assert str(whole(1, 1000)) == "a whole number from 1 to 1000"
    assert str(whole(64, 4096, 8)) == "a whole number from 64 to 4096, a multiple of 8"
    assert str(real(0, 100, above=True)) == "a number above 0, at most 100"
    assert str(real(0, 1, below=True)) == "a number from 0 below 1"
    assert [each.range for each in (whole(), whole(1, 8), real(), real(above=True), real(0, 1, below=True))] == [
        "1 or more",
        "1 to 8",
        "0 or more",
        "above 0",
        "0 to below 1",
    ]
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        whole()("x" * 100_000)
    assert len(str(caught.value)) < 150


def test_an_option_given_again_adds_to_its_values_and_takes_the_defaults_away() -> None:
    def parsed(command: str, *words: str) -> argparse.Namespace:
        return build_parser().parse_args([command, *words])

    given = ["--face", "f.png", "--prompt", "a", "--prompt", "b", "--out", "o"]
    assert parsed("generate", *given).prompt == ["a", "b"]
    sweep = parsed("sweep", *given, "--scales", "1", "2", "--scales", "3", "--layers", "up", "--layers", "all")
    assert (sweep.scales, sweep.layers, sweep.timesteps) == ([1, 2, 3], ["up", "all"], [0, 150, 300])
    assert parsed("sweep", *given).scales == [2, 4, 8]  # the defaults were not changed by the call before
    words = ["--model", "m", "--data", "d", "--out", "o", "--validation-prompt", "a", "--validation-prompt", "b", "c"]
    assert parsed("train", *words).validation_prompt == ["a", "b", "c"]
    assert parsed("ablate", "--seeds", "4", "--seeds", "5").seeds == [4, 5]


@pytest.mark.parametrize("rate", ["nan", "inf", "0", "-1", "x", ""])
def test_a_number_inside_a_word_is_checked_alike(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ablate", "pairs", "--data", "d", "--out", "o", "--steps", "1", "--rate", f"ip-adapter={rate}"]
    assert main(words) == 2
    assert "the rate must be a number above 0, at most 100" in capsys.readouterr().err


def test_a_grid_that_would_fill_the_memory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["avatars", "--out", str(tmp_path / "o"), "--people", "100", "--per-person", "100", "--size", "1024"]
    assert main(words) == 2
    assert "100 x 100 pictures of 1024 pixels" in capsys.readouterr().err and not (tmp_path / "o").exists()


# --- The rest of the command line ------------------------------------------------------------------------------------


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    from face_fusion_pipeline import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"face-fusion {__version__}\n"


def test_a_value_of_any_length_with_line_breaks_gives_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "--lr-scheduler", "a\nb" * 100_000], ["no\ncommand" * 10_000], ["evaluate", "--x\ny"]):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("face-fusion: error: ") and len(line) < 2200


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_terminal_that_lacks_letters_loses_no_result(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "猫 и é"

    def printed(*words: str) -> str:
        """What a command writes to a terminal of this encoding."""
        terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main(words) == 0
        terminal.flush()
        return terminal.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]

    draw = ["avatars", "--size", "32", "--people", "1", "--per-person", "1", "--out", str(out)]
    assert "avatars.png" in printed(*draw) and (out / "avatars.png").is_file()
    assert json.loads(printed(*draw, "--json")) == {"image": str(out / "avatars.png")}
    for command in commands():
        assert "--" in printed(command, "--help")


def test_files_that_are_not_utf8_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.md"
    table.write_bytes("| Größe |".encode("latin-1"))
    out = ["--out", str(tmp_path / "out")]
    for words, option in (
        (["push", "--table", str(table), *out], "--table"),
        (["avatars-publish", "--model", str(tmp_path), "--table", str(table), *out], "--table"),
        (["ablate", "pairs", "--data", "d", "--steps", "1", "--docs", str(table), *out], "--docs"),
    ):
        assert main(words) == 2
        assert f"error: {option} {table} is not UTF-8 text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b"", b"null", b"\xff\xfe", b"{", b'{"_class_name": 3}', b"[" * 9999]
)
def test_a_model_index_that_is_none_is_named(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_bytes(content)
    given, out = ["--model", str(tmp_path)], ["--out", str(tmp_path / "out")]
    photos = ["--face", "f.png", "--prompt", "a cat"]
    for words in (
        ["generate", *photos, *given, *out],
        ["sweep", *photos, *given, *out],
        ["app", *given],
        ["ablate", "pairs", "--data", "d", "--steps", "1", *given, *out],
    ):
        assert main(words) == 2, words
        assert "model_index.json" in capsys.readouterr().err.splitlines()[-1]
