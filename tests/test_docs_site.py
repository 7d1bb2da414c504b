"""The documentation builds strictly: every link and anchor leads somewhere, every module's API is there."""

import importlib.util
import pathlib
import re
import subprocess
import sys
import urllib.parse

import pytest

ROOT = pathlib.Path(__file__).parents[1]
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings") is None,
    reason="the site's tools are absent: pip install -e .[docs]",
)


@pytest.mark.slow
@needs_mkdocs
def test_the_site_builds_and_its_links_lead_somewhere():
    done = subprocess.run(
        [sys.executable, "tools/docs_site.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    site = ROOT / "build" / "site"
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 20
    broken = []
    for page in pages:
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if urllib.parse.urlparse(link).scheme or link.startswith("//"):
                continue
            target = page.parent / urllib.parse.unquote(link)
            if not target.exists():
                broken.append(f"{page.relative_to(site)}: {link}")
    assert not broken, broken[:20]
    api = (site / "reference" / "diffusion.html").read_text()
    assert "sora_jax.diffusion.flow.interpolate" in api
