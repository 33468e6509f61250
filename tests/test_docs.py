"""README.md and docs/: every block of code runs, and every command line has flags that exist.

A block is a fenced one, or lines indented by four spaces. It is one of these:

- Python (fenced as python, or indented and valid Python with an import or a call): executed, the blocks of a page one
  after the other in one namespace, in a folder where the files that they name are at hand (`AT_HAND`). Training is
  replaced by writing a tiny run; its config is checked.
- Command lines (their first word is in `COMMANDS`, or they are fenced as a shell's): parsed by the command's own
  parser, not run. Flags of benchmarks are looked up in their source.
- Anything else is text.

A comment right before a block excludes it and says why: `<!-- not run: why -->`, `<!-- needs hardware -->`. Command
lines and `--config.` fields in the text, between backticks, are checked too.
"""

import ast
import dataclasses
import importlib
import itertools
import os
import pathlib
import re
import runpy
import shlex
import tomllib

import jax
import pytest

import ifm_jax
from ifm_jax import config as configs
from ifm_jax.cli.config_flag import ConfigFlag
from ifm_jax.cli.flags import Flags
from ifm_jax.runs import exporting
from tests import small

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {"docs/methods.md": "tests/test_methods.py"}  # pages whose Python a file of its own runs

_MARKER = re.compile(r"<!-- (needs hardware|not run: \S.*) -->")
_SHELLS = ("bash", "console", "sh", "shell")


@dataclasses.dataclass
class Block:
    """A block of a page.

    Attributes:
      text: its lines, without indentation.
      line: number of its first line in the page.
      language: of a fenced block; "" for none.
      marker: the comment before it that excludes it, or None.
    """

    text: str
    line: int
    language: str = ""
    marker: str | None = None

    @property
    def is_python(self):
        if self.language:
            return self.language in ("python", "py")
        try:
            tree = ast.parse(self.text)
        except SyntaxError:
            return False
        return any(isinstance(node, ast.Call | ast.Import | ast.ImportFrom) for node in ast.walk(tree))

    @property
    def commands(self):
        """Its command lines."""
        if self.language and self.language not in _SHELLS:
            return []
        found, lines = [], iter(self.text.splitlines())
        for line in lines:
            line = line.removeprefix("$ ")
            if line.split(" ")[0] not in COMMANDS and not (self.language and line.strip() and line[0] != "#"):
                continue
            head = re.split(r"\s{2,}", line.strip())[0]  # what follows is a remark, perhaps with an apostrophe
            if not line.endswith("\\") and not _is_open(head):
                line = head
            while line.endswith("\\") or _is_open(line):  # it goes on
                following = next(lines, None)
                if following is None:
                    break
                line = f"{line[:-1].rstrip()} {following.strip()}" if line.endswith("\\") else f"{line}\n{following}"
            found.append(line)
        return found


def _is_open(line):
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return False


def blocks_of(text):
    """Returns the blocks of a page, and its other lines."""
    blocks, others, marker, fence = [], [], None, None
    indented, may_begin = False, True  # within an indented block; whether one may begin here
    for number, line in enumerate(text.splitlines(), 1):
        opening = re.match(r"(\s*)(```+|~~~+)\s*([\w-]*)", line)
        if fence is not None:
            if line.strip() == fence[1]:
                fence = None
            else:
                blocks[-1].text += line.removeprefix(fence[0]) + "\n"
        elif opening:
            fence, indented, may_begin = (opening[1], opening[2]), False, False
            blocks.append(Block("", number + 1, opening[3], marker))
            marker = None
        elif line.startswith("    ") and line.strip() and (indented or may_begin):
            if not indented:
                blocks.append(Block("", number, "", marker))
                indented, marker = True, None
            blanks = number - blocks[-1].line - blocks[-1].text.count("\n")
            blocks[-1].text += "\n" * blanks + line[4:] + "\n"
        elif not line.strip():
            may_begin = True  # and the block that is open may go on
        else:
            found = _MARKER.fullmatch(line.strip())
            marker, indented, may_begin = found and found[1], False, bool(found)
            others.append(line)
    return blocks, others


# --- Commands --------------------------------------------------------------------------------------------------------


def _of_cli(name):
    return importlib.import_module(f"ifm_jax.cli.{name}").flags()


def _of_demo():
    if (ROOT / "ifm_jax" / "cli" / "demo.py").exists():
        return _of_cli("demo")
    return Flags(runpy.run_path(str(ROOT / "demo.py"))["Options"], config=ConfigFlag())


def _of_benchmark(name):
    """Returns the flags of a benchmark, from its source: importing them all would take longer than all other checks."""
    flags = Flags(config=ConfigFlag())
    for file in (f"{name}.py", "command.py"):
        for node in ast.walk(ast.parse((ROOT / "benchmarks" / file).read_text())):
            function = getattr(getattr(node, "func", None), "attr", "")
            if function.startswith("DEFINE_"):
                flags.add(node.args[0].value, lambda text, _: text, switch=function == "DEFINE_bool")
    return flags


_SCRIPTS = {"train.py": "train", "eval_linear.py": "evaluate", "convert_checkpoints.py": "convert"}
_MODULES = {"ifm_jax.replay": "replay", "ifm_jax.evaluation.suppression": "suppression"}
_PARSERS = {}


def parser_of(words):
    """Returns the parser of a command line of this project and the arguments after the command, or None for others."""
    program, *rest = words
    name, make = None, _of_cli
    if program == "ifm-jax" or rest[:2] == ["-m", "ifm_jax"]:
        rest = rest[2:] if program != "ifm-jax" else rest
        name = {"eval": "evaluate"}.get(rest[0], rest[0]) if rest else "main"
    elif rest[:1] == ["-m"] and rest[1] in _MODULES:
        rest, name = rest[1:], _MODULES[rest[1]]
    elif rest[:1] == ["-m"] and rest[1].startswith("benchmarks."):
        rest, name, make = rest[1:], rest[1].removeprefix("benchmarks."), _of_benchmark
    elif rest and rest[0] in _SCRIPTS:
        name = _SCRIPTS[rest[0]]
    elif rest and rest[0] == "demo.py":
        name, make = "demo", lambda name: _of_demo()
    if name is None:
        return None
    arguments = [each for each in rest[1:] if each not in ("--help", "-h")]
    if not arguments and make is _of_cli:
        importlib.import_module(f"ifm_jax.cli.{name}")  # it exists
    key = make is _of_benchmark, name
    if key not in _PARSERS:
        _PARSERS[key] = make(name) if name != "main" else None
    return _PARSERS[key], arguments


def check_python(words):
    found = parser_of(words)
    if found is None:
        if words[1:2] == ["-c"]:
            ast.parse(words[2])
            return
        module = words[2].replace(".", "/") if words[1] == "-m" else words[1]
        assert any((ROOT / f"{module}{end}").exists() for end in ("", ".py")) or words[1] == "-m", words
        return
    parser, arguments = found
    if parser is not None:
        given = parser.parse(arguments)
        recipe = given.config.recipe or getattr(given.options, "config", "")
        if isinstance(recipe, str) and recipe:
            check_recipe(recipe)


def check_recipe(recipe):
    """Asserts that a recipe exists, unless it is a stand-in such as configs/x.py or FILE.py."""
    stem = pathlib.PurePath(recipe).stem
    if stem != "x" and stem == stem.lower() and "." not in stem:
        places = [ROOT / recipe, ROOT / "configs" / f"{recipe}.py"]
        assert any(place.is_file() for place in places), f"there is no recipe {recipe}"


def check_make(words):
    makefile = (ROOT / "Makefile").read_text()
    for target in (word for word in words[1:] if "=" not in word):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"the Makefile has no target {target}"


def check_pip(words):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[1:]:
        if of := re.match(r"(?:\.|ifm_jax|ifm-jax)\[(.*)\]", word):
            assert set(of[1].split(",")) <= set(known), f"{word}: the extras are {', '.join(known)}"


def check_nothing(words):
    """Of the shell itself."""


def refuse(words):
    """Of others: nothing here knows their flags."""
    raise AssertionError(f"{words[0]} cannot be checked here: mark the block with <!-- not run: why -->")


COMMANDS = {
    "cd": check_nothing,
    "export": check_nothing,
    "git": check_nothing,
    "ifm-jax": check_python,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    **dict.fromkeys(["docker", "gcloud", "gcsfuse", "kubectl", "sbatch", "srun", "tfds"], refuse),
}


def variants(line):
    """Yields the words of a command line, once for each `a|b`; without remarks and stand-ins.

    After two spaces or a # there is a remark; brackets say that a flag may be left out; `...` means more of the same;
    a single capital letter is a number.
    """
    if "\n" not in line:
        line = re.split(r"\s{2,}", line.strip())[0]
    line = re.sub(r"\[(--[^\]]*)\]", r"\1", line)
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    words = [re.sub(r"(?<==)[A-Z]$", "1", word) for word in words]
    choices = []
    for word in words:
        name, equals, value = word.partition("=")
        several = equals and re.fullmatch(r"[\w.-]+(\|[\w.-]+)+", value)
        choices.append([f"{name}={each}" for each in value.split("|")] if several else [word])
    yield from map(list, itertools.product(*choices))


def problem_of(line):
    """Returns what is wrong with a command line, or None."""
    for words in variants(line):
        check = COMMANDS.get(words[0])
        if check is None:
            return f"{words[0]} is unknown here: mark the block with <!-- not run: why -->"
        try:
            check(words)
        except (ValueError, AssertionError, ImportError, SyntaxError) as error:  # UsageError is a ValueError
            return str(error)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_have_flags_that_exist(page):
    blocks, others = blocks_of(page.read_text())
    problems = []
    for block in blocks:
        if block.marker is None and not block.is_python:
            for line in block.commands:
                if (problem := problem_of(line)) is not None:
                    problems.append(f"{page.name}:{block.line}: {line}: {problem}")
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", "\n".join(others))
    for code in (code for code in inline if "<" not in code):  # <a stand-in in words>
        if code.split(" ")[0] in ("ifm-jax", "make", "pip", "python") and (problem := problem_of(code)) is not None:
            problems.append(f"{page.name}: {code}: {problem}")
    for text in [*inline, *(block.text for block in blocks if block.marker is None)]:
        for name in re.findall(r"(?:^|\s)--(?:no)?config\.([\w.]+)", text):
            if name not in ("field", "FIELD") and configs.find(name) is None:
                problems.append(f"{page.name}: {text}: there is no config field {name}")
    assert not problems, "\n".join(problems)


# --- Python ----------------------------------------------------------------------------------------------------------


def tiny_run(path):
    small.write_run(path, small.config(data__trifeature__train_size=32, eval__neighbors=5))


def tiny_program(path):
    tiny_run("for_program")
    exporting.export("for_program", path, platforms=("cpu",))


# Name in a block -> what makes the file of that name.
AT_HAND = {
    "runs/trifeature": tiny_run,
    "encoder.jax": tiny_program,
}


def train(config, workdir, **options):
    """Stands for `ifm_jax.train`: checks the config and writes a tiny run."""
    configs.validate(config)
    if not pathlib.Path(workdir).exists():
        tiny_run(workdir)


def python_blocks(page):
    return [block for block in blocks_of(page.read_text())[0] if block.is_python and block.marker is None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if python_blocks(page) and str(page.relative_to(ROOT)) not in ELSEWHERE],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ifm_jax, "train", train)
    names = {"__name__": page.stem}
    for block in python_blocks(page):
        for name, make in AT_HAND.items():
            if name in block.text and not os.path.exists(name):
                make(pathlib.Path(name))
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as users have it
            exec(code, names)


def test_pages_elsewhere_are_tested_there():
    for page, file in ELSEWHERE.items():
        assert pathlib.Path(page).name in (ROOT / file).read_text()


# --- The test itself -------------------------------------------------------------------------------------------------

PAGE = """\
Text with `--config.no.field=1`, `python train.py --wrokdir=x` and `make nothing`.

    python train.py --workdir=DIR        a remark
    python eval_linear.py --workdir=DIR \\
        --kn [--fast] ...

    python convert_checkpoints.py to-torch DIR FILE --for=moco|keras

<!-- not run: why -->
    gcloud run

- an item
    continued, which is no block

```python
x = 1
```

```bash
gcloud run
pip install 'ifm_jax[nothing]'
```

    import sys
    y = x + 1

    z = y + 1

<!-- needs hardware -->

```python
never()
```

    InfoNCE = softplus(z) of something
"""


def test_blocks_are_found_and_mistakes_too(tmp_path):
    blocks, others = blocks_of(PAGE)
    assert [(block.language, block.is_python, block.marker, len(block.commands)) for block in blocks] == [
        ("", False, None, 3),
        ("", False, "not run: why", 1),
        ("python", True, None, 0),
        ("bash", False, None, 2),
        ("", True, None, 0),
        ("python", True, "needs hardware", 0),
        ("", False, None, 0),
    ]
    assert blocks[4].text == "import sys\ny = x + 1\n\nz = y + 1\n"
    assert [PAGE.splitlines()[block.line - 1].strip() for block in blocks][4] == "import sys"
    assert "    continued, which is no block" in others
    (tmp_path / "page.md").write_text(PAGE)
    with pytest.raises(AssertionError) as caught:
        test_command_lines_have_flags_that_exist(tmp_path / "page.md")
    said = str(caught.value)
    for part in (
        "there is no config field no.field",
        "did you mean --workdir?",
        "no target nothing",
        "there is no flag --kn",
        "--for=keras",
        "gcloud cannot be checked here",
        "the extras are cuda",
    ):
        assert part in said, part
    assert said.split("\nassert")[0].count("page.md:") == 7
