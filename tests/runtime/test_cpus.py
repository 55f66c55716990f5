"""Threads by default: affinity, physical cores, a quota. A made-up /proc and /sys stand in for the machine."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

from fasa_gguf.runtime import cpus


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Files of a machine of 8 CPUs, two to a core (0 and 4, 1 and 5, ...); `allow` is the affinity."""

    class Machine:
        allowed = frozenset(range(8))

        def write(self, path, text):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text + "\n")

        def allow(self, *numbers):
            self.allowed = frozenset(numbers)

    m = Machine()
    for i in range(8):
        m.write(f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings", f"{(1 << i % 4) | (1 << i % 4 + 4):02x}")
    m.write("proc/self/cgroup", "0::/a/b")
    monkeypatch.setattr(cpus, "ROOT", tmp_path)
    monkeypatch.setattr(cpus, "_allowed", lambda: m.allowed)
    return m


def test_physical_cores_of_the_affinity(machine):
    assert cpus.usable_cores() == 4
    machine.allow(0, 1, 5)
    assert cpus.usable_cores() == 2
    machine.allow(7)
    assert cpus.usable_cores() == 1


def test_efficiency_cores_do_not_count_where_there_are_others(machine):
    machine.write("sys/devices/cpu_core/cpus", "0-1,4-5")
    machine.write("sys/devices/cpu_atom/cpus", "2,3,6,7")
    assert cpus.usable_cores() == 2
    machine.allow(2, 3)
    assert cpus.usable_cores() == 2


@pytest.mark.parametrize("n, cores", [(1, 1), (4, 4), (5, 2), (12, 6)])
def test_without_a_topology_as_llama_cpp_guesses(machine, tmp_path, n, cores):
    for i in range(8):
        (tmp_path / f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings").unlink()
    machine.allow(*range(n))
    assert cpus.usable_cores() == cores


@pytest.mark.parametrize(
    "file, text, cores",
    [
        ("a/b/cpu.max", "200000 100000", 2),
        ("a/b/cpu.max", "250000 100000", 2),  # whole CPUs
        ("a/b/cpu.max", "50000 100000", 1),
        ("a/b/cpu.max", "max 100000", 4),
        ("a/b/cpu.max", "", 4),
        ("a/b/cpu.max", "0 0", 4),
        ("a/b/cpu.max", "6400000 100000", 4),
        ("a/cpu.max", "300000 100000", 3),  # a limit of a group above
        ("cpu.max", "100000 100000", 1),  # in a container the root is its own group
    ],
)
def test_the_quota_of_a_container(machine, file, text, cores):
    machine.write(f"sys/fs/cgroup/{file}", text)
    assert cpus.usable_cores() == cores


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("path", ["docker/1/", ""])
@pytest.mark.parametrize("quota, cores", [("300000", 3), ("-1", 4)])
def test_the_quota_of_the_first_version(machine, folder, path, quota, cores):
    machine.write("proc/self/cgroup", "5:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/")
    machine.write(f"sys/fs/cgroup/{folder}/{path}cpu.cfs_quota_us", quota)
    machine.write(f"sys/fs/cgroup/{folder}/{path}cpu.cfs_period_us", "100000")
    assert cpus.usable_cores() == cores


def test_contexts_follow_the_affinity(library, tiny):
    code = (
        "import os, sys\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from fasa_gguf import Llama\nfrom fasa_gguf.session import Session\n"
        "s = Session(sys.argv[1], n_ctx=256)\nprint(s.llama.llama_n_threads(s.ctx))\n"
        "m = Llama(sys.argv[1], n_ctx=256, fasa='off', verbose=False)\n"
        "print(m.n_threads, m.n_threads_batch)\nm.close()\n"
        "m = Llama(sys.argv[1], n_ctx=256, fasa='off', verbose=False, n_threads=3, n_threads_batch=5)\n"
        "print(m.n_threads, m.n_threads_batch)\nm.close()\n"
    )
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs Linux's affinity")
    run = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.split() == ["1", "1", "1", "3", "5"], run.stderr
