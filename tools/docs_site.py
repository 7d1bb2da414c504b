"""Builds the documentation's site: guides, experiments, model cards, and the API from its docstrings.

    python tools/docs_site.py            # build/site/index.html, which opens from the disk too
    python tools/docs_site.py --serve    # and shows it, rebuilt as files change

Pages are the repository's own: they keep their places, so a link that works in a checkout works on the site.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
GUIDES = {
    "README.md": "Start",
    "docs/abilities.md": "Abilities",
    "docs/command_line.md": "Command line",
    "docs/coming_from.md": "From diffusers or MaxDiffusion",
    "docs/design.md": "Design",
    "docs/scaling.md": "Scaling",
    "CONTRIBUTING.md": "Contributing",
    "CHANGELOG.md": "Changelog",
}
# Served as they are where a page links to them.
KINDS = {".md", ".png", ".gif", ".jpg", ".py", ".json", ".jsonl", ".cff", ".sh", ".ipynb", ".srt", ".txt", ""}
LEFT_OUT = ("tests/", ".ci/", ".github/")


def main() -> None:
    parser = argparse.ArgumentParser(description="The documentation as a site.")
    parser.add_argument("--serve", action="store_true", help="Show it, rebuilt as files change.")
    serve = parser.parse_args().serve
    copy_pages()
    command = ["serve"] if serve else ["build", "--strict", "--quiet"]
    config = PAGES.parent / "mkdocs.yml"
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    config.write_text(yaml.safe_dump(site | {"nav": navigation()}, sort_keys=False, allow_unicode=True))
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *command, "--config-file", str(config)],
        check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    raise SystemExit(done.returncode)


def copy_pages() -> None:
    """The repository's pages and what they show, and a page a package for the API."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for name in tracked_files():
        path = pathlib.Path(name)
        if path.suffix in KINDS and not name.startswith(LEFT_OUT) and (ROOT / name).is_file():
            (PAGES / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, PAGES / path)
    for package, modules in packages().items():
        page = PAGES / "reference" / f"{package}.md"
        page.parent.mkdir(exist_ok=True)
        title = f"sora_jax.{package}" if package != "sora_jax" else package
        blocks = [f"::: {module}" for module in modules]
        page.write_text("\n\n".join([f"# {title}", *blocks]) + "\n")


def tracked_files() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def packages() -> dict[str, list[str]]:
    """The modules of each package, in the order of docs/design.md's table."""
    found: dict[str, list[str]] = {}
    table = re.findall(
        r"^\| `(?:sora_jax|([a-z_]+))/` \| (.+) \|$", (ROOT / "docs/design.md").read_text(), re.M
    )
    for package, files in table:
        names = [name.strip() for name in files.split(",")]
        prefix = f"sora_jax.{package}." if package else "sora_jax."
        modules = [prefix + name.replace("/", ".") for name in names if "\\" not in name]
        found.setdefault(package or "sora_jax", []).extend(modules)
    return found


def navigation() -> list[dict[str, object]]:
    """Guides by hand; experiments, model cards and the API as they are found."""
    pages = {path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md")}
    folders = sorted(page for page in pages if re.fullmatch(r"experiments/\w+/README.md", page))
    experiments: list[object] = [
        page for page in ("experiments/README.md", "experiments/LOG.md") if page in pages
    ]
    experiments += [{title(page): page} for page in folders]
    cards = sorted(page for page in pages if page.startswith("sora_jax/bundled/"))
    others = sorted(page for page in pages if page.startswith("docs/") and page not in GUIDES)
    guides = [{name: page} for page, name in GUIDES.items() if page in pages]
    return [
        *guides[:3],
        *({title(page): page} for page in others),
        *guides[3:],
        {"Experiments": experiments},
        {"Models": [{pathlib.Path(card).parent.name: card} for card in cards]},
        {"Findings": "findings/README.md"},
        {"API": [{name: f"reference/{name}.md"} for name in packages()]},
    ]


def title(page: str) -> str:
    """A page's first heading."""
    return next(line for line in (PAGES / page).read_text().splitlines() if line.startswith("# "))[2:]


if __name__ == "__main__":
    main()
