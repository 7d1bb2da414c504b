"""Settings of a backend before it starts: XLA's flags, in one place, and the folder of compiled programs.

Read when the package is imported and without importing JAX: both are environment variables that JAX and XLA read
when they start. What the user has set is left as it is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import sys
import warnings

from sora_jax.errors import UserError

__version__ = "0.1.0"
ONEDNN = "--xla_cpu_experimental_onednn_custom_call"
"""bfloat16 products and 3-D convolutions through oneDNN: without it XLA widens every product to float32."""

FLAGS = {
    # Measured on two cores of AMD Zen 5 (experiments/LOG.md): a training step of the transformer in bfloat16 takes
    # 2.2 times as long without the first, and another 8% without the second.
    "cpu": {ONEDNN: "true", "--xla_cpu_prefer_vector_width": "512"},
    # Nothing was measured on these by us: XLA's own choice.
    "gpu": {},
    "tpu": {},
}
# Versions of jaxlib that have these flags: XLA ends a process over an unknown one.
KNOWN = ("0.10", "0.11", "0.12")
OLDEST = (0, 10)
CACHE = "JAX_COMPILATION_CACHE_DIR"
LOGS = "TF_CPP_MIN_LOG_LEVEL"
TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")

_log = logging.getLogger(__name__)


def prepare() -> None:
    """Sets what isn't set yet: flags, the level of logs, and a folder for compiled programs that can be used."""
    version = importlib.metadata.version("jaxlib")
    if version.rpartition(".")[0].startswith(KNOWN) and platform.machine().lower() in ("x86_64", "amd64"):
        given = os.environ.get("XLA_FLAGS", "")
        own = [
            f"{name}={value}"
            for flags in FLAGS.values()
            for name, value in flags.items()
            if name not in given
        ]
        os.environ["XLA_FLAGS"] = " ".join([given, *own]).strip()
    # XLA reports a slow compile ("Very slow compile?", "The operation took ...") as an error, and has no flag against
    # it: 3 shows fatal ones alone. Errors that matter to a program reach Python as exceptions either way.
    os.environ.setdefault(LOGS, "3")
    # Programs with oneDNN's calls can't be kept (jax 0.12: bad_alloc while writing them), and JAX says so each time.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
    if CACHE not in os.environ:
        os.environ[CACHE] = str(cache_home() / "xla" / f"{version}-{_machine()}")
    _check_cache()


def restart_with_huge_pages() -> None:
    """Starts a training command again, in the same process, so that memory comes in pages of 2 MiB.

    XLA's CPU backend allocates a step's memory each time, and the kernel hands it out in pages of 4 KiB, zeroing
    each: a tenth to a fifth of a training step (experiments/speed). glibc asks for larger ones where `GLIBC_TUNABLES`
    says so before a process begins. Does nothing where that is set, where Linux gives no huge pages to programs
    that ask, with another C library, and where Python was started by something else than this package's commands.
    """
    program = pathlib.Path(sys.argv[0]).parts
    modules = (("sora_jax", "train", "__main__.py"), ("sora_jax", "sweep", "worker.py"))
    ours = program[-1:] == ("sora-jax",) or program[-3:] in modules
    if not ours or TUNABLES in os.environ or platform.libc_ver()[0] != "glibc":
        return
    try:
        given_when_asked = "[madvise]" in HUGE_PAGES.read_text()
    except OSError:
        return
    if given_when_asked:
        environment = os.environ | {TUNABLES: "glibc.malloc.hugetlb=1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def check_version() -> None:
    """Raises UserError where JAX is too old; commands ask before they import what needs it."""
    version = importlib.metadata.version("jax")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        least = ".".join(map(str, OLDEST))
        raise UserError(
            f"sora_jax needs jax {least} or newer and finds {version}: run pip install -U jax jaxlib, with Python 3.11 "
            "or newer."
        )


def onednn() -> bool:
    """Whether XLA's CPU backend may call oneDNN."""
    return f"{ONEDNN}=true" in os.environ.get("XLA_FLAGS", "")


def _check_cache() -> None:
    folder = os.environ[CACHE]
    if not folder or "://" in folder:  # switched off, or a bucket
        return
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        _log.warning(
            "Compiled programs can't be kept in %s (%s), so each start compiles again: set %s to a folder that can "
            "be written, or to nothing.",
            folder,
            error.strerror,
            CACHE,
        )
        os.environ[CACHE] = ""


def cache_home() -> pathlib.Path:
    """The package's folder for what can be made again."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()
    return pathlib.Path(home) / "sora_jax"


def _machine() -> str:
    """Names the kind of processor: a program compiled for another one may stop this one. Homes are shared."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        kept = [line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))]
    except OSError:
        kept = [platform.processor()]
    return hashlib.sha256("\n".join([platform.machine(), *kept]).encode()).hexdigest()[:8]
