import json
import os
import subprocess
import sys

import pytest

import holdfast
from holdfast.cli.app import QUIET, run
from holdfast.cli.options import default_study

HEAVY = ("torch", "transformers", "numpy", "pyarrow", "scipy", "jinja2", "httpx")
HELP = (
    "import sys; from holdfast.cli.app import main\n"
    "try: main(sys.argv[1:])\n"
    f"finally: print('LOADED', [m for m in {HEAVY} if m in sys.modules])\n"
)
VERBS = (
    [],
    *([verb] for verb in ("audit", "rollout", "probe", "trace", "report")),
    *([verb] for verb in ("compare", "doctor", "organism", "evaluate", "export")),
    *([verb] for verb in ("select", "finetune", "signal", "sinks")),
    *([verb] for verb in ("heads", "ablate", "bake", "probe-transfer")),
    *(["guard", verb] for verb in ("fit", "evaluate")),
    *(["judge", verb] for verb in ("calibrate", "rerun")),
    *(["organism", verb] for verb in ("list", "show", "train", "export")),
)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help(verb, capsys):
    assert run([*verb, "--help"]) == 0
    assert "Usage: holdfast" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    """What takes its time is loading; seconds are the machine's, and not asserted."""
    found = subprocess.run(
        [sys.executable, "-c", HELP, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "LOADED []" in found.stdout


def test_the_version_is_that_of_the_package(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == holdfast.__version__


def test_a_configuration_file_sets_defaults_and_flags_win(
    thinker, world, tmp_path, capsys
):
    config = tmp_path / "holdfast.toml"
    config.write_text("[rollout]\nlimit = 3\nmax-answer = 8\nseed = 7\n")
    study = tmp_path / "study"
    command = ["rollout", str(thinker), *world[:-2], "-o", str(study), "--json"]
    assert run([*command, "--config", str(config), "--limit", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 10
    manifest = json.loads((study / "study.json").read_text())
    asked = manifest["settings"]["rollout"]
    assert (asked["limit"], asked["max_answer"], asked["seed"]) == (2, 8, 7)


@pytest.mark.parametrize(
    ("words", "verb"),
    [(["decide"], "decide"), (["organism", "shw"], "organism"), (["decidez"], "")],
)
def test_a_command_that_cannot_be_read_names_the_help_of_its_verb(words, verb, capsys):
    assert run(words) == 2
    spoken = " ".join(filter(None, ("holdfast", verb, "--help")))
    assert f"Try `{spoken}`." in capsys.readouterr().err


def test_a_damaged_configuration_file_is_named(tmp_path, capsys):
    config = tmp_path / "holdfast.toml"
    config.write_text("[audit\n")
    assert run(["audit", "--config", str(config)]) == 2
    assert "TOML" in capsys.readouterr().err
    config.write_text("[audit]\nno-such-flag = 1\n")
    assert run(["audit", "--config", str(config)]) == 2
    assert "no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "start"),
    [
        ("organism:cliff", "cliff-20"),
        ("owner/name", "name-20"),
        ("/models/some thing/", "some-thing-20"),
    ],
)
def test_a_study_is_named_for_its_model_and_the_day(model, start):
    path = default_study(model)
    assert path.parent.name == "studies"
    assert path.name.startswith(start)


def test_organisms_are_listed_for_people_and_machines(capsys):
    assert run(["organism", "list", "--json"]) == 0
    names = {card["name"] for card in json.loads(capsys.readouterr().out)}
    assert {"aligned", "cliff"} <= names
    assert run(["organism", "list"]) == 0
    assert "organism:cliff" in capsys.readouterr().out


def test_every_public_name_is_there_and_no_other():
    for name in holdfast.__all__:
        assert getattr(holdfast, name) is not None, name
    assert dir(holdfast) == sorted(holdfast.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = holdfast.nothing


@pytest.mark.parametrize("library", ["tqdm", "tqdm.auto"])
def test_libraries_draw_no_bars_between_our_lines(library):
    code = f"from {library} import tqdm; list(tqdm(range(3)))"
    command = [sys.executable, "-c", code]

    def drawn(**more):
        plain = {k: v for k, v in os.environ.items() if k not in QUIET}
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=plain | more
        )
        return done.stderr

    assert "3/3" in drawn()
    assert drawn(**QUIET) == ""
