"""`--config FILE.yaml`: all flags of any command from a file; those on the command line win."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import options
from pipelines.cli import COMMANDS, main
from tests.conftest import jpeg


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Writes a file and gives the flags that name it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "night.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def error_of(parse: Any, argv: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "Traceback" not in error
    return error


EVERY_KIND = """
input: [s3://photos/2026/*.tar, "s3://photos/new/{00000..00041}.tar"]   # a list
catalog: gs://night/catalog
input_format: tar
ops: [quality, embedding]
max_failure_rate: 0.02
batch_size: 64
prune: true
storage_options:
  key: me
  client_kwargs: {region_name: eu-central-1}
"""


def test_every_kind_of_value(config: Any) -> None:
    found = options.parse_build(config(EVERY_KIND))
    written = ["--input", "s3://photos/2026/*.tar", "s3://photos/new/{00000..00041}.tar", "--catalog", "gs://night/catalog",
               "--input_format", "tar", "--ops", "quality,embedding", "--max_failure_rate", "0.02", "--batch_size", "64",
               "--prune", "--storage_options", '{"key": "me", "client_kwargs": {"region_name": "eu-central-1"}}']  # fmt: skip
    assert found == options.parse_build(written)


def test_the_command_line_wins(config: Any) -> None:
    flags = config(EVERY_KIND + "model: compact\nexperiments: [a, b]\n")
    argv = ["--input", "other.tar", "--batch_size=8", "--ops", "quality", "--storage_options", "{}", "--experiments=c"]
    for found in (options.parse_build([*flags, *argv]), options.parse_build([*argv, *flags])):
        assert found.input == ("other.tar",) and found.batch_size == 8 and found.ops == ("quality",)
        assert found.storage_options == {} and found.beam_args == ("--experiments=c",)
        assert found.catalog == "gs://night/catalog" and found.prune


def test_a_switch_that_is_false_and_single_values(config: Any) -> None:
    found = options.parse_build(config("input: a.tar\ncatalog: c\nops: quality\nprune: false\n"))
    assert (found.input, found.ops, found.prune) == (("a.tar",), ("quality",), False)


def test_flags_of_beam(config: Any) -> None:
    flags = config("input: i\ncatalog: c\njob_name: nightly\nsave_main_session: true\nexperiments: [a, b]\n")
    beam_args = ("--job_name=nightly", "--save_main_session", "--experiments=a", "--experiments=b")
    assert options.parse_build(flags).beam_args == beam_args
    assert options.parse_build([*flags, "--job_name", "mine"]).beam_args == (*beam_args[1:], "--job_name", "mine")


def test_switches_of_beam_that_are_off(config: Any, capsys: pytest.CaptureFixture) -> None:
    flags = ["--input", "gs://i", "--catalog", "gs://c", "--runner", "SparkRunner"]
    off = options.parse_build([*config("use_public_ips: false\nsave_main_session: false\n"), *flags])
    assert off.beam_args == ("--no_use_public_ips", "--no_save_main_session")
    assert "region: must be a value, got the switch false" in error_of(
        options.parse_build, [*config("region: no\n"), *flags], capsys
    )
    assert "--parallelism: flags stand there without their dashes" in error_of(
        options.parse_build, [*config("--parallelism: 3\n"), *flags], capsys
    )


def test_other_runners_have_flags_of_their_own(config: Any) -> None:
    flags = config("input: i\ncatalog: c\nrunner: FlinkRunner\nflink_thing: 3\n")
    assert options.parse_build(flags).beam_args == ("--flink_thing=3",)


def test_a_file_that_holds_nothing(config: Any, capsys: pytest.CaptureFixture) -> None:
    found = options.parse_build([*config("# nothing yet\n"), "--input", "i", "--catalog", "c"])
    assert found == options.parse_build(["--input", "i", "--catalog", "c"])
    assert "the following arguments are required: --input, --catalog" in error_of(
        options.parse_build, config(""), capsys
    )


def test_positional_arguments(config: Any) -> None:
    assert options.parse_inspect(config("catalog: c\njson: true\n")).catalog == "c"
    assert options.parse_inspect([*config("catalog: c\n"), "other"]).catalog == "other"
    assert options.parse_index(config("catalog: c\nnum_threads: 3\n")).num_threads == 3
    assert options.parse_evaluate(config("task: retrieval\ninput: i\n")).task == "retrieval"
    search = config("catalog: c\nquery: [a dog, a cat]\nk: 3\n")
    assert options.parse_search(search).query == ("a dog", "a cat") and options.parse_search(search).k == 3
    assert options.parse_search([*search, "a hen", "-k", "5", "an owl"]).query == ("a hen", "an owl")
    assert options.parse_search([*search, "a hen"]).catalog == "c"


def test_a_flag_goes_by_its_own_name(config: Any) -> None:
    parser = options._parser("x", "")
    parser.add_argument("-n", "--no_index", dest="index", action="store_false")
    assert parser.parse_args(config("no_index: true\n")).index is False
    assert parser.parse_args(config("no_index: false\n")).index is True
    assert parser.parse_args([*config("no_index: false\n"), "-n"]).index is False


def test_train_and_score(config: Any, tmp_path: Path) -> None:
    text = "kind: captioner\ninput: i\nvalidation: [v, w]\noutput: o\nmodel: compact\nfinetune: [image]\n"
    found = options.parse_train(config(text))
    assert (found.kind, found.model, found.text_model, found.validation) == (
        "captioner",
        "compact",
        "compact",
        ("v", "w"),
    )
    assert found.finetune == {"image"} and found.epochs == options._TRAINING_DEFAULTS["captioner"]["epochs"]
    assert options.parse_train([*config(text), "--validation", "x"]).validation == ("x",)
    # What is for other kinds is told from the file as well.
    with pytest.raises(SystemExit):
        options.parse_train(config(text + "mixing: 0.5\n"))
    (tmp_path / "more.flags").write_text("--epochs 3  # as before\n")
    assert options.parse_train([*config(text), f"@{tmp_path}/more.flags"]).epochs == 3
    assert options.parse_score(config("image: a.jpg\ntext: [a, b]\n")).text == ("a", "b")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_it(command: str, capsys: pytest.CaptureFixture, config: Any) -> None:
    parse = getattr(options, f"parse_{command.replace('-', '_')}")
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "--config FILE.yaml" in capsys.readouterr().out
    error = error_of(parse, config("storage_option: {}\n"), capsys)
    assert error.startswith(f"beamsight {command}: error: ") and "night.yaml: storage_option: no such flag" in error


def test_the_environment(config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("BUCKET", "photos")
    monkeypatch.setenv("BATCH", "32")
    monkeypatch.delenv("NO_SUCH", raising=False)
    text = "input: ['s3://${BUCKET}/*.tar', 'x-{a,b}-$${BUCKET}-$BUCKET']\ncatalog: c\nbatch_size: ${BATCH}\n"
    found = options.parse_build(config(text + "storage_options: {client_kwargs: {name: 'in ${BUCKET}'}}\n"))
    assert found.input == ("s3://photos/*.tar", "x-{a,b}-${BUCKET}-$BUCKET") and found.batch_size == 32
    assert found.storage_options == {"client_kwargs": {"name": "in photos"}}
    text = "input: i\ncatalog: c\nstorage_options: {key: '${NO_SUCH}'}\n"
    error = error_of(options.parse_build, config(text), capsys)
    assert "night.yaml: storage_options: ${NO_SUCH} is not set in the environment" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_failure_rat: 0.1", "night.yaml: max_failure_rat: no such flag; did you mean max_failure_rate?"),
        ("max-failure-rate: 0.1", "max-failure-rate: no such flag; did you mean max_failure_rate?"),
        ("xyzzy: 1", "night.yaml: xyzzy: no such flag (see "),
        ("config: other.yaml", "config: no such flag"),
        ("help: true", "help: no such flag"),
        ("batch_size: many", "night.yaml: batch_size: invalid whole number value: 'many'"),
        ("batch_size: 0", "batch_size: must be at least 1, got 0"),
        ("batch_size: [1, 2]", "batch_size: must be one value, got the list [1, 2]"),
        ("batch_size: true", "batch_size: must be a value, got the switch true"),
        ("batch_size:", "batch_size: must be a value, got nothing: null"),
        ("max_failure_rate: 5", "max_failure_rate: must be in [0, 1], got 5"),
        ("prune: 'yes'", 'prune: must be true or false, got the text "yes"'),
        ("device: gpu", "device: unknown device 'gpu'; use auto, cpu, cuda or cuda:N"),
        ("input: {a: b}", 'input: must be a value, got the mapping {"a": "b"}'),
        ("input: [a, [b]]", "input: must be one value, or a list of them, got the list "),
        ("input: []", "input: must be one value, or a list of them, got the list []"),
        ("storage_options: [a]", "storage_options: must be one value, got the list "),
        ("storage_options: a", "storage_options: must be a JSON object, got 'a'"),
        ("ops: [',']", "ops: must name at least one"),
        ("job_name:", "job_name: has no value"),
        ("model: a\nmodel: b", "night.yaml: model: stands there more than once"),
        ("input: [a", "night.yaml: not YAML: line 2, column 1: expected ',' or ']'"),
        ("a: b: c", "not YAML: line 1, column 5: mapping values are not allowed here"),
        ("x: !!python/object:os.system {}", "not YAML: line 1, column 4: could not determine a constructor"),
        ("x: \x07", "not YAML: unacceptable character"),
        ("- input", "night.yaml: must be lines of `flag: value`, not the list"),
        ("input", "night.yaml: must be lines of `flag: value`, not the text"),
    ],
)
def test_mistakes(text: str, message: str, config: Any, capsys: pytest.CaptureFixture) -> None:
    argv = [*config(text + "\n"), "--input", "i", "--catalog", "c"]
    assert message in error_of(options.parse_build, argv, capsys)


def test_mistakes_of_the_file_itself(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def error(*argv: str) -> str:
        return error_of(options.parse_build, [*argv, "--input", "i", "--catalog", "c"], capsys)

    assert "argument --config: cannot read 'no.yaml': No such file or directory" in error("--config", "no.yaml")
    assert f"cannot read '{tmp_path}': Is a directory" in error(f"--config={tmp_path}")
    assert "argument --config: expected one argument" in error("--config")
    assert "argument --config: must be given once, got " in error(*config("model: a"), *config("model: a"))
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff\n")
    assert (
        "cannot read " in (message := error("--config", f"{tmp_path}/latin.yaml")) and "codec can't decode" in message
    )


def test_a_build_and_a_look_at_it(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    text = f"input: {tmp_path}/*.jpg\ncatalog: {tmp_path}/c\nmodel: python:tests.toys\nops: quality\ndevice: cpu\n"
    assert main(["build", *config(text)]) == 0
    capsys.readouterr()
    assert main(["inspect", *config(f"catalog: {tmp_path}/c\njson: true\n")]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 1


def test_the_page_on_nights(
    monkeypatch: pytest.MonkeyPatch, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "nightly.md").read_text()
    monkeypatch.setenv("BEAMSIGHT_CATALOG", "/srv/catalog")
    monkeypatch.setenv("S3_ENDPOINT", "https://s3.example.org")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    found = options.parse_build(config(example))
    assert found.catalog == "/srv/catalog" and found.storage_options == {"endpoint_url": "https://s3.example.org"}
    assert found.allowed_schemes == ("s3", "https") and len(found.input) == 2
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    compile(program, "dag.py", "exec")
    # What it says of metrics.json is what is written there.
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    flags = ["--catalog", f"{tmp_path}/c", "--model", "python:tests.toys", "--ops", "quality", "--device", "cpu"]
    assert main(["build", "--input", f"{tmp_path}/a.jpg", *flags]) == 0
    (metrics,) = tmp_path.glob("c/runs/*/metrics.json")
    table = page[page.index("| field |") : page.index("Run ids begin")]
    fields = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.partition(" | ")[0])]
    assert len(fields) > 12 and set(fields) <= set(json.loads(metrics.read_text()))


def test_a_wrong_file_is_told_at_once(config: Any) -> None:
    code = (
        "import sys\nfrom pipelines.cli import main\n"
        f"try: main(['inspect', *{config('catalo: c')!r}])\nexcept SystemExit as stopped: assert stopped.code == 2\n"
        "assert not {'torch', 'apache_beam', 'pyarrow', 'transformers', 'faiss'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
