"""Hook of mkdocs: the pages of the site that are made from other files, so that no text stands in two places.

    index, contributing, changelog     README.md, CONTRIBUTING.md, CHANGELOG.md
    quickstart                         docs/quickstart.ipynb
    reference/config                   the fields of ifm_jax/config.py
    reference/recipes                  the docstrings of configs/
    reference/*                        the docstrings of the package, read by mkdocstrings without importing it

The pages in docs/ link to each other and to files of the repository as on a code host. Where the site has the file as a
page, the link leads there; otherwise it leads to the `repo_url` of mkdocs.yml, and is plain text if none is set.
"""

import ast
import importlib.util
import json
import pathlib
import posixpath
import re
import sys

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Files outside docs/ that are pages.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# Reference pages: title, and modules with their public names.
MODULES = {
    "losses": ("Losses", ("ifm_jax.methods.losses", "ifm_jax.methods.queue")),
    "methods": ("Methods", ("ifm_jax.methods", "ifm_jax.pretrain")),
    "models": ("Networks", ("ifm_jax.models",)),
    "augment": ("Augmentation", ("ifm_jax.augment",)),
    "optim": ("Optimizers", ("ifm_jax.optim",)),
    "data": ("Images", ("ifm_jax.data",)),
    "evaluation": ("Evaluation", ("ifm_jax.evaluation",)),
    "studies": ("Studies", ("ifm_jax.studies",)),
}

_LINK = re.compile(r"(?P<text>\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^()\s]+)\)")
_CODE = re.compile(r"^(```.*?^```|(?: {4,}|\t).*?)$", re.MULTILINE | re.DOTALL)


class Examples(griffe.Extension):
    """Lets griffe read the docstrings' section `Example:`, which it knows as `Examples:` only."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Renames the section."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made from other files."""
    pages = {page: (ROOT / source).read_text() for source, page in PAGES.items()}
    notebook = ROOT / "docs" / "quickstart.ipynb"
    pages["quickstart.md"] = notebook_page(notebook)
    pages["reference/config.md"] = config_page()
    pages["reference/recipes.md"] = recipes_page()
    pages["reference/ifm_jax.md"] = public_page()
    for name, (title, modules) in MODULES.items():
        pages[f"reference/{name}.md"] = "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)])
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Redirects the links to files of the repository."""
    sources = {page: source for source, page in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def redirect(match: re.Match[str]) -> str:
        path, hash_, anchor = match["target"].partition("#")
        if not path or ":" in path:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        target = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if target and files.get_file_from_path(target):
            here = posixpath.dirname(page.file.src_uri) or "."
            return f"{match['text']}({posixpath.relpath(target, here)}{hash_}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # which mkdocs reports
        if config.repo_url:
            return f"{match['text']}({config.repo_url.rstrip('/')}/blob/main/{path}{hash_}{anchor})"
        return match["text"][1:-1]

    # Not in blocks of code.
    parts = _CODE.split(markdown)
    return "".join(part if index % 2 else _LINK.sub(redirect, part) for index, part in enumerate(parts))


def notebook_page(path: pathlib.Path) -> str:
    """Returns a notebook as a page: its text and its code, without results."""
    cells = json.loads(path.read_text())["cells"]
    texts = []
    for cell in cells:
        text = "".join(cell["source"]).rstrip()
        texts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    title, *rest = texts
    return "\n\n".join([title, f"This page as a notebook: [{path.name}]({path.name})", *rest])


def config_page() -> str:
    """Returns the reference of the config: every field with its values, its default and its meaning."""
    from ifm_jax.config import fields

    lines = [
        "# Config",
        "",
        "Every field is a flag, `--config.NAME=VALUE`, and an attribute of `ifm_jax.Config()`. The defaults are the "
        "original's; [recipes](recipes.md) change some of them. Flags of the original stand in parentheses. A resumed "
        "run may change the fields marked \\*; another value of the others is another run.",
    ]
    table = ["", "| field | value | default | meaning |", "|---|---|---|---|"]
    groups: dict[str, list[str]] = {"": ["", "## A run", *table]}
    for name, known in fields().items():
        if known.is_group:
            groups[name] = ["", f"## {name}", "", f"{_sentence(known.declared.meaning)}.", *table]
            continue
        mark = " \\*" if known.free_on_resume else ""
        cells = (f"`{name}`{mark}", known.expected(), f"`{_as_text(known.default)}`", known.declared.meaning)
        groups[name.rpartition(".")[0]].append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines + [line for group in groups.values() if group[-1] != table[-1] for line in group])


def recipes_page() -> str:
    """Returns the docstrings of the recipes."""
    parts = ["# Recipes", "`--config=NAME` finds a recipe by its name; `--config=FILE.py` reads one of your own."]
    for path in sorted((ROOT / "configs").glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text()))
        parts += [f"## {path.stem}", text or ""]
    return "\n\n".join(parts)


def public_page() -> str:
    """Returns the directive for the names of `ifm_jax` itself; its modules and the config have pages of their own."""
    import ifm_jax

    names = [name for name in ifm_jax.__all__ if importlib.util.find_spec(f"ifm_jax.{name}") is None]
    listed = "".join(f"\n        - {name}" for name in names if name != "Config")
    directive = f"::: ifm_jax\n    options:\n      members:{listed}"
    return f"# ifm_jax\n\n`Config` has its own page: [Config](config.md).\n\n{directive}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _as_text(value: object) -> str:
    """Formats a default as it is written on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value) or '""'
