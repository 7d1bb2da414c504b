"""What is set before JAX starts: flags that nobody has set, and a folder for compiled programs that can be written."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest

from sora_jax import backend


@pytest.fixture
def clean(monkeypatch, tmp_path):
    for name in ("XLA_FLAGS", backend.CACHE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backend.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda name: "0.12.1")
    return monkeypatch


def test_flags_are_set_and_those_of_the_user_stay(clean):
    backend.prepare()
    assert backend.onednn() and "--xla_cpu_prefer_vector_width=512" in os.environ["XLA_FLAGS"]
    mine = f"{backend.ONEDNN}=false --xla_force_host_platform_device_count=4"
    clean.setenv("XLA_FLAGS", mine)
    backend.prepare()
    assert os.environ["XLA_FLAGS"] == f"{mine} --xla_cpu_prefer_vector_width=512"
    assert not backend.onednn()


@pytest.mark.parametrize(
    ("machine", "version"), [("arm64", "0.12.0"), ("x86_64", "0.13.0"), ("x86_64", "0.1.2")]
)
def test_no_flag_is_set_where_xla_may_not_know_it(clean, machine, version):
    clean.setattr(backend.platform, "machine", lambda: machine)
    clean.setattr(backend.importlib.metadata, "version", lambda name: version)
    backend.prepare()
    assert os.environ["XLA_FLAGS" if "XLA_FLAGS" in os.environ else backend.CACHE].count("xla_cpu") == 0


def test_compiled_programs_are_kept_in_the_users_cache(clean, tmp_path):
    backend.prepare()
    folder = pathlib.Path(os.environ[backend.CACHE])
    assert folder.is_dir() and folder.parent == tmp_path / "sora_jax" / "xla"
    clean.setenv(backend.CACHE, "")  # switched off stays so
    backend.prepare()
    assert os.environ[backend.CACHE] == ""


def test_a_folder_that_cannot_be_written_is_told_and_done_without(clean, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    clean.setenv(backend.CACHE, str(tmp_path / "file" / "inside"))
    backend.prepare()
    [record] = caplog.records
    assert "can't be kept in" in record.getMessage() and "compiles again" in record.getMessage()
    assert os.environ[backend.CACHE] == ""


def test_a_second_start_takes_what_the_first_compiled(tmp_path):
    program = (
        "import sora_jax, jax, jax.numpy as jnp\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))\n"
        "x = jnp.ones((64, 64), jnp.bfloat16)\n"
        "print(float(jax.jit(lambda x: jnp.tanh(x @ x).sum())(x)), any('cache_hits' in name for name in hits))"
    )
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    env.pop(backend.CACHE, None)
    told = [
        subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert [line.split() for line in told] == [["4096.0", "False"], ["4096.0", "True"]]


@pytest.mark.parametrize(
    "command", [("sora_jax.cli.main", "models"), ("sora_jax.train.__main__", "--config=x")]
)
def test_an_old_jax_is_told_in_one_sentence(command, monkeypatch, capsys):
    module, argument = command
    main = importlib.import_module(module).main
    versions = lambda name: "0.9.2" if name == "jax" else "1.0"
    monkeypatch.setattr(backend.importlib.metadata, "version", versions)
    assert main([argument]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: sora_jax needs jax 0.10 or newer and finds 0.9.2: run pip install -U jax")


SLOW = """
import sora_jax, jax, jax.numpy as jnp

def folded():  # by the compiler, in about two seconds
    return jax.lax.reduce_window(jnp.arange(3e6), 0.0, jax.lax.add, (41,), (1,), "SAME")

jax.jit(folded)()
print("compiled")
jax.block_until_ready(jnp.zeros(1 << 46, jnp.int8))
"""


@pytest.mark.slow
def test_a_slow_compile_raises_no_alarm_and_a_real_error_is_told(tmp_path):
    own = {name: value for name, value in os.environ.items() if name != backend.LOGS}
    run = lambda **more: subprocess.run(
        [sys.executable, "-c", SLOW], capture_output=True, text=True, env=own | {backend.CACHE: ""} | more
    )
    loud, quiet = run(**{backend.LOGS: "1"}), run()
    assert "The operation took" in loud.stderr, "what is quieted would be said"
    assert "The operation took" not in quiet.stderr and "slow_operation" not in quiet.stderr
    for done in (loud, quiet):
        assert done.stdout == "compiled\n" and "RESOURCE_EXHAUSTED" in done.stderr


@pytest.mark.parametrize(
    ("changes", "restarts"),
    [
        ({}, True),
        ({"program": "/somewhere/sora_jax/train/__main__.py"}, True),
        ({"program": "/somewhere/pytest/__main__.py"}, False),
        ({"tunables": "glibc.malloc.hugetlb=0"}, False),
        ({"pages": "[always] madvise never"}, False),
        ({"library": "musl"}, False),
    ],
)
def test_training_starts_again_where_huge_pages_are_given_to_who_asks(
    monkeypatch, tmp_path, changes, restarts
):
    settings = {
        "program": "/bin/sora-jax",
        "tunables": None,
        "pages": "always [madvise] never",
        "library": "glibc",
    }
    settings |= changes
    pages = tmp_path / "enabled"
    pages.write_text(settings["pages"] + "\n")
    calls = []
    monkeypatch.setattr(backend, "HUGE_PAGES", pages)
    monkeypatch.setattr(backend.platform, "libc_ver", lambda: (settings["library"], "2.36"))
    monkeypatch.setattr(backend.os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(sys, "argv", [settings["program"], "train"])
    monkeypatch.setattr(sys, "orig_argv", ["python", settings["program"], "train"])
    monkeypatch.delenv(backend.TUNABLES, raising=False)
    if settings["tunables"]:
        monkeypatch.setenv(backend.TUNABLES, settings["tunables"])
    backend.restart_with_huge_pages()
    assert bool(calls) == restarts
    if restarts:
        program, arguments, environment = calls[0]
        assert [program, *arguments] == [sys.executable, sys.executable, settings["program"], "train"]
        assert environment[backend.TUNABLES] == "glibc.malloc.hugetlb=1"
