"""The site is built without a warning, and the notebook of the quick start runs."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_command_line import ROOT, environment

pytestmark = pytest.mark.slow
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. A link, an anchor or a name of the reference that leads nowhere is an error."""
    directory = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={directory}"],
        cwd=ROOT,
        env=environment() | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return directory


def page(site, name):
    return (site / name / "index.html").read_text()


def test_pages_show_what_they_are_made_from(site):
    from ifm_jax import config

    reference = page(site, "reference/config")
    for name, known in config.fields().items():
        if not known.is_group:
            assert f"<code>{name}</code>" in reference
    for recipe in (ROOT / "configs").glob("[!_]*.py"):
        assert f'id="{recipe.stem}"' in page(site, "reference/recipes")
    assert 'id="ifm_jax.train"' in page(site, "reference/ifm_jax")
    assert 'id="ifm_jax.methods.losses.ifm_info_nce"' in page(site, "reference/losses")
    title = (ROOT / "README.md").read_text().partition("\n")[0].removeprefix("# ")
    assert f">{title}<" in (site / "index.html").read_text()
    assert 'href="../methods/"' in page(site, "contributing")


def test_lists_are_lists(site):
    """Markdown on a code host needs no blank line before a list; the site's does, and would show a paragraph."""
    for path in site.rglob("*.html"):
        for paragraph in path.read_text().split("<p>")[1:]:
            lines = paragraph.partition("</p>")[0].splitlines()
            assert not any(line.startswith(("- ", "1. ")) for line in lines), (path, lines)


def test_pages_load_nothing_from_other_hosts(site):
    for path in site.rglob("*.html"):
        for part in path.read_text().split("<")[1:]:
            tag = part.partition(">")[0]
            if tag.startswith(("script", "img")) or (tag.startswith("link") and "stylesheet" in tag):
                assert "://" not in tag, (path, tag)


def test_notebook_runs(tmp_path):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(code).replace("STEPS = 128", "STEPS = 32"))
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment() | {"MPLBACKEND": "agg", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines()[-3:]] == ["shape", "texture", "color"]
    assert (tmp_path / "runs" / "quickstart" / "metrics.jsonl").exists()
