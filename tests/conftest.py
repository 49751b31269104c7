"""What every test gets: one thread, no network, seeded random numbers, and a torchvision that imports."""

import os

# Before torch is imported: its thread pools read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[name] = "1"

import socket  # noqa: E402
from ipaddress import ip_address  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from dmscale.sources import allow_missing_torchvision_operators  # noqa: E402

torch.set_num_threads(1)
allow_missing_torchvision_operators()

# Two busy cores make single examples slow at random; the examples themselves are the same in every run.
settings.register_profile("dmscale", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dmscale")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A download is an error at once, not a test that passes only where there is a network."""
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            raise RuntimeError(f"a test tried to reach {address[0]}; the library and its tests work offline")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
